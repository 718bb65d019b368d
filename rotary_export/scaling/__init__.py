"""The rope types of Hugging Face configs: read them, compute them, replace what has a state."""

from rotary_export.scaling.config import read_rope
from rotary_export.scaling.embedding import ScaledRotaryEmbedding
from rotary_export.scaling.frequencies import (
    RopeParameters,
    compute_attention_factor,
    compute_inv_freq,
)

__all__ = [
    "RopeParameters",
    "ScaledRotaryEmbedding",
    "compute_attention_factor",
    "compute_inv_freq",
    "read_rope",
]
