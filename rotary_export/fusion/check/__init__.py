"""A model before and after, compared by running both.

- `feeds.py`: inputs that mean something to the model.
- `compare.py`: runs both and compares the outputs.
"""
