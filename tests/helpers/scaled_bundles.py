"""The ropes that the tests of scaled bundles export, and inputs of their graphs."""

from __future__ import annotations

import torch

from rotary_export.rope import ScaledRotaryEmbedding, read_rope

SWITCH, ROWS = 16, 40
HALF = 8
SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2 * HALF,
    "max_position_embeddings": SWITCH,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1 + 0.1 * i for i in range(HALF)],
    "long_factor": [2 + 0.7 * i for i in range(HALF)],
    "original_max_position_embeddings": SWITCH,
    "factor": 4.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SWITCH}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "longrope": LONG,
    "mscales": LONG | {"short_mscale": 1.1, "long_mscale": 1.3},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": SWITCH,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "chunked": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    "interleaved": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    "chunked-longrope": LONG | {"mrope_section": [2, 3, 3]},
    "chunked-dynamic": {"rope_type": "dynamic", "factor": 3.0, "mrope_section": [2, 3, 3]},
}
# Those with files of every format; the others are as `default`, with other numbers.
WHOLE = ("default", "dynamic", "longrope", "chunked", "chunked-longrope", "chunked-dynamic")
MOVING = ("dynamic", "longrope", "chunked-longrope", "chunked-dynamic")


def make_values(name):
    return SIZES | {"rope_parameters": {"rope_theta": 100.0, **ROPES[name]}}


def make_rope(name):
    return ScaledRotaryEmbedding(read_rope(make_values(name))[None])


def make_inputs(name, length, batch=3, seq_len=5):
    """Inputs of rotate whose largest position is length - 1."""
    generator = torch.Generator().manual_seed(length)
    shape = (3, batch, seq_len) if "mrope_section" in ROPES[name] else (batch, seq_len)
    ids = torch.randint(0, length, shape, generator=generator)
    ids[..., 1, 2] = length - 1
    query = torch.randn(batch, 4, seq_len, 2 * HALF, generator=generator)
    key = torch.randn(batch, 2, seq_len, 2 * HALF, generator=generator)
    return {"query": query, "key": key, "position_ids": ids}
