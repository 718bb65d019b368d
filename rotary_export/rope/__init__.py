"""The rope types of Hugging Face configs: read them, compute them, replace what has a state.

parameters.py             `RopeParameters`: what every rope type has, and what its record contains
types/                    one file each rope type: name, keys, reader, formula
rope_types.py             the rope types by name; parameters from a manifest
axes.py                   positions of several axes: which axis each column has
config.py                 `read_rope`: the rotary embeddings of a config
entries.py                one of them: the fields that every type has
fields.py                 fields of a config, checked when they are read
families.py               what configs leave to the family (`model_type`)
scaled_embedding.py       `ScaledRotaryEmbedding`: cos and sin of positions, stateless
scaled_query_key.py       query and key, rotated from what a `ScaledRotaryEmbedding` stores
stateless_replacement.py  stateless replacements for transformers' rotary modules
"""

from rotary_export.rope.config import read_rope
from rotary_export.rope.parameters import RopeParameters
from rotary_export.rope.scaled_embedding import ScaledRotaryEmbedding

__all__ = ["RopeParameters", "ScaledRotaryEmbedding", "read_rope"]
