"""Bundles of the small ropes in `rope_cases.BUNDLES`, and inputs of their graphs."""

from __future__ import annotations

import torch
from helpers.rope_cases import BOUNDARY, BUNDLES, HALF

from rotary_export.rope import ScaledRotaryEmbedding, read_rope

ROWS = 40
SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2 * HALF,
    "max_position_embeddings": BOUNDARY,
}
# Those with files of every format; the others are as `default`, with other numbers.
WHOLE = ("default", "dynamic", "longrope", "chunked", "chunked-longrope", "chunked-dynamic")
LENGTH_DEPENDENT = ("dynamic", "longrope", "chunked-longrope", "chunked-dynamic")


def make_values(name):
    return SIZES | {"rope_parameters": {"rope_theta": 100.0, **BUNDLES[name]}}


def make_rope(name):
    return ScaledRotaryEmbedding(read_rope(make_values(name))[None])


def make_inputs(name, length, batch=3, seq_len=5):
    """Make inputs of rotate whose largest position is length - 1."""
    generator = torch.Generator().manual_seed(length)
    shape = (3, batch, seq_len) if "mrope_section" in BUNDLES[name] else (batch, seq_len)
    ids = torch.randint(0, length, shape, generator=generator)
    ids[..., 1, 2] = length - 1
    query = torch.randn(batch, 4, seq_len, 2 * HALF, generator=generator)
    key = torch.randn(batch, 2, seq_len, 2 * HALF, generator=generator)
    return {"query": query, "key": key, "position_ids": ids}
