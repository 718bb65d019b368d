"""The cache of an encoder-decoder: one of its own that grows, and the encoder's keys and values.

Imports transformers: import it late.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import EncoderDecoderCache

from rotary_export.models.decoder.cache import rebuild_cache

_KINDS = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")


class CrossCache(EncoderDecoderCache):
    """Keys and values of a decoder's layers, of its tokens and of its encoder.

    Args:
        tensors: (decoder key, decoder value, encoder key, encoder value, ...), four for each layer.
    """

    self_attention_cache: Any
    cross_attention_cache: Any

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        own, cross = (
            [t for at in range(0, len(tensors), 4) for t in tensors[at + first :][:2]]
            for first in (0, 2)
        )
        super().__init__(rebuild_cache(own), rebuild_cache(cross))
        self.is_updated = dict.fromkeys(range(len(tensors) // 4), True)

    def rebuild(self, tensors: Sequence[Tensor]) -> CrossCache:
        """Return such a cache of other tensors."""
        return CrossCache(tensors)

    def read_tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name, as optimum names them."""
        both = zip(self.self_attention_cache.layers, self.cross_attention_cache.layers, strict=True)
        return {
            f"past_key_values.{index}.{kind}": tensor
            for index, (own, cross) in enumerate(both)
            for kind, tensor in zip(
                _KINDS, (own.keys, own.values, cross.keys, cross.values), strict=True
            )
        }

    def name_present(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what has grown, by name."""
        for index, layer in enumerate(self.self_attention_cache.layers):
            yield f"present.{index}.decoder.key", layer.keys
            yield f"present.{index}.decoder.value", layer.values
