"""Settings that hold for every test."""

import os

import torch

# Two workers share two cores; more threads than that make timings, not results, worse.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
