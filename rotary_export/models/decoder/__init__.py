"""Causal language models that generate: their caches, their example inputs, their files.

- `options.py`: what `export_model` is asked for: the cache, the logits.
- `cache.py`: key/value caches as named tensors, and back.
- `window.py`: a cache whose layers with a sliding window keep that window alone.
- `static.py`: a cache of a fixed length.
- `inputs.py`: example inputs with a cache: made, or completed.
- `describe.py`: what the manifest says of a decoder.
- `generate.py`: the proof: tokens against the model's own `generate`.
- `files.py`: config, tokenizer and chat template, as other runtimes need them.
"""
