"""A cache of a fixed length: a token's keys and values are written at its position.

So the slot of a token is its position id, in each row of its own. Rows of unequal lengths are
padded at the right; what a padded token wrote is hidden by the mask, and overwritten later.
Imports transformers: import it late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

FULL_LAYERS, WINDOW_LAYERS = "full_attention", "sliding_attention"  # kinds of masks


class StaticLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values, (B, N, max_cache_len, H) each.

    Args:
        max_cache_len: How many positions it holds.
    """

    keys: Any
    values: Any

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.max_cache_len = max_cache_len
        self.positions: Tensor | None = None  # (B, S), of the new tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values at their positions; return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (
                states.new_zeros(*states.shape[:2], self.max_cache_len, states.shape[3])
                for states in (key_states, value_states)
            )
        assert self.positions is not None
        slots = self.positions[:, None, :, None]  # (B, 1, S, 1)
        self.keys = self.keys.scatter(2, slots.expand(key_states.shape), key_states)
        self.values = self.values.scatter(2, slots.expand(value_states.shape), value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the first position of what a mask covers."""
        return self.max_cache_len, 0

    def get_seq_length(self) -> int:
        """Return 0: the positions are an input."""
        return 0


class StaticCache(Cache):
    """A cache of static layers, and the masks that it needs.

    Args:
        windows: Of each layer, its window; None: it has none.
        max_cache_len: How many positions it holds.
        mask_dtype: Of masks that are added to scores; None: they are bool.
        tensors: (key, value, key, value, ...), two for each layer; none: they are zeros.
    """

    layers: Any

    def __init__(
        self,
        windows: Sequence[int | None],
        max_cache_len: int,
        mask_dtype: torch.dtype | None,
        tensors: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(layers=[StaticLayer(max_cache_len) for _ in windows])
        self.windows, self.max_cache_len, self.mask_dtype = (
            tuple(windows),
            max_cache_len,
            mask_dtype,
        )
        for layer, keys, values in zip(self.layers, tensors[0::2], tensors[1::2], strict=False):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values

    def rebuild(self, tensors: Sequence[Tensor]) -> StaticCache:
        """Return such a cache of other tensors."""
        dtype = None if self.mask_dtype is None else tensors[0].dtype
        return StaticCache(self.windows, self.max_cache_len, dtype, tensors)

    def empty(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return what the tensors of an empty cache are."""
        return [torch.zeros_like(tensor) for tensor in tensors]

    def list_dims(self) -> dict[str, int | str]:
        """Return the size of the axis of positions, by name of a tensor."""
        return {
            f"past_key_values.{index}.{kind}": self.max_cache_len
            for index in range(len(self.windows))
            for kind in ("key", "value")
        }

    def arrange(self, arguments: dict[str, Any]) -> None:
        """Give layers their positions, and replace the mask of slots by one of scores."""
        positions, mask = arguments["position_ids"], arguments["attention_mask"]
        for layer in self.layers:
            layer.positions = positions
        slots = torch.arange(self.max_cache_len, device=mask.device)
        ids = positions[:, None, :, None]  # (B, 1, S, 1)
        seen = (slots <= ids) & (mask[:, None, None, :] != 0)  # (B, 1, S, max_cache_len)
        masks = {
            WINDOW_LAYERS if window else FULL_LAYERS: self._convert(
                seen & (slots > ids - window) if window else seen
            )
            for window in dict.fromkeys(self.windows)
        }
        arguments["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))

    def _convert(self, seen: Tensor) -> Tensor:
        if self.mask_dtype is None:
            return seen
        hidden = torch.finfo(self.mask_dtype).min
        return torch.where(seen, 0.0, hidden).to(self.mask_dtype)
