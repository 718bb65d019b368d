"""The rope types of Hugging Face configs: read them, compute them, replace what has a state."""

from rotary_export.rope.config import read_rope
from rotary_export.rope.frequencies import (
    RopeParameters,
    compute_attention_factor,
    compute_inv_freq,
)
from rotary_export.rope.scaled_embedding import ScaledRotaryEmbedding

__all__ = [
    "RopeParameters",
    "ScaledRotaryEmbedding",
    "compute_attention_factor",
    "compute_inv_freq",
    "read_rope",
]
