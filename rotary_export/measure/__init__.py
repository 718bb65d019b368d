"""How long it takes: timing on a noisy machine, and `bench`."""
