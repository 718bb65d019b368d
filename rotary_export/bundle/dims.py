"""The names of dynamic sizes and of cached tensors: the same in graphs, manifests and the proof."""

import re

BATCH, SEQ, PAST = "batch_size", "seq_len", "past_seq_len"
TOTAL = f"{PAST} + {SEQ}"  # what a key/value cache contains after a step


def is_past(name: str) -> bool:
    """Return whether an input's name is that of cached keys or values, (B, N, S, H)."""
    return re.fullmatch(r"past_key_values\.\d+\.(key|value)", name) is not None


def name_output(past: str) -> str:
    """Return the name of the output that contains an input of cached keys or values, grown."""
    return past.replace("past_key_values", "present", 1)
