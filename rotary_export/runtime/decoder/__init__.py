"""Generate tokens with a bundle: a loop over its graph, without torch.

- `load_decoder.py`: `load_decoder`.
- `decoder.py`: `Decoder`: prefill, step, generate, stream.
- `graph.py`: one run of the graph, on bound memory.
- `cache.py`: the buffers of keys and values, which grow or are written in place.
- `prompts.py`: prompts as an array and a mask, checked.
- `settings.py`: what `generate` is asked for, `generation_config.json`, defaults.
- `sampling.py`: from logits to tokens.
- `text.py`: text to token ids and back, by the bundle's tokenizer.
- `chat.py`: chat templates.
"""
