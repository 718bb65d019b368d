"""Causal language models that generate: their caches, their example inputs, their files.

- `options.py`: what `export_model` is asked for: the cache, the logits.
- `cache.py`: key/value caches as named tensors, and back.
- `inputs.py`: example inputs with a cache: made, or completed.
- `describe.py`: what the manifest says of a decoder.
- `files.py`: config, tokenizer and chat template, as other runtimes need them.
"""
