"""Causal language models that generate: their caches, their example inputs, their files.

- `parts.py`: the graphs that a model becomes.
- `options.py`: what `export_model` is asked for: the cache, the logits.
- `cache.py`: key/value caches as named tensors, and back.
- `window.py`: a cache whose layers with a sliding window keep that window alone.
- `static.py`: a cache of a fixed length.
- `encoder.py`: an encoder-decoder as two graphs.
- `cross.py`: its cache.
- `inputs.py`: example inputs with a cache: made, or completed.
- `describe.py`: what the manifest says of a decoder.
- `generate.py`: the proof: tokens against the model's own `generate`.
- `files.py`: config, tokenizer and chat template, as other runtimes need them.
"""
