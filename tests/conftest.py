"""Settings that hold for every test."""

import gc
import os

import torch

# Two workers share two cores; more threads than that make timings, not results, worse.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """Leave what was imported out of each garbage collection: millions of objects that stay."""
    gc.collect()
    gc.freeze()
