"""The proof: a bundle against eager PyTorch and a float64 oracle; `verify`."""
