"""A model before and after, compared by running both.

- `feeds.py`: inputs that mean something to the model.
- `runs.py`: runs a model, as it was and fused.
- `arithmetic.py`: the narrowest type between a rotary call and an output.
- `compare.py`: compares the outputs of both, and those of every rotary call.
"""
