"""Every private name of torch, transformers and the servers that the package touches."""
