"""x-transformers: the cache that its decoders return, read and made without importing it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def is_layer_cache(value: Any) -> bool:
    """Whether a value is what its decoders accept as `cache`."""
    module = sys.modules.get("x_transformers.x_transformers")
    return module is not None and isinstance(value, module.LayerIntermediates)


def list_layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the (key, value) of each layer, (B, N, S, H); keys are not rotated yet."""
    return [layer.cached_kv for layer in cache.attn_intermediates or () if layer.cached_kv]


def make_layer_cache(layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Make a cache of (key, value) for each layer of self-attention."""
    module = sys.modules["x_transformers.x_transformers"]
    return module.LayerIntermediates(
        attn_intermediates=[
            module.Intermediates(cached_kv=layer, layer_type="a") for layer in layers
        ],
        cache_length=layers[0][0].shape[-2] if layers else 0,
    )
