"""What another language, a browser or a server needs to run a bundle: `deploy` writes it."""
