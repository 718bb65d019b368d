"""MLServer: the embedded server, and a bundle as one of its runtimes."""
