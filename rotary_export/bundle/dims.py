"""The names of open sizes: the same in graphs, manifests and the proof."""

BATCH, SEQ, PAST = "batch_size", "seq_len", "past_seq_len"
TOTAL = f"{PAST} + {SEQ}"  # what a key/value cache holds after a step
