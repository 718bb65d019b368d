"""Ray Serve: the embedded server, and a bundle as an application."""
