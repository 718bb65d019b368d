"""A model before and after, compared by running both.

- `feeds.py`: inputs that mean something to the model.
- `runs.py`: runs a model, as it was and fused.
- `compare.py`: compares the outputs of both, and those of every rotary call.
"""
