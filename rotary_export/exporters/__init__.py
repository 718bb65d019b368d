"""From a `RotaryEmbedding` to a bundle: one file per format, `bundle.py` puts them together."""
