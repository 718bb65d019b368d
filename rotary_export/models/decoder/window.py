"""A cache whose layers with a sliding window keep that window alone, as transformers' own does.

transformers branches on how many positions there were; here the same is computed without a branch,
so that one graph holds before and past the window. Imports transformers: import it late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from rotary_export.bundle.dims import PAST, bound_dim


class WindowLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of the last positions: one less than the window, as the next token has it.

    Args:
        sliding_window: Positions that a token sees, itself included.
    """

    is_sliding = True
    keys: Any
    values: Any

    def __init__(self, sliding_window: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sliding_window = sliding_window
        self.seen = 0  # positions so far, those that were dropped included

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the kept and the new keys and values; keep the last of both."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = torch.cat((self.keys, key_states), dim=-2)
        values = torch.cat((self.values, value_states), dim=-2)
        start = torch.sym_max(keys.shape[-2] - (self.sliding_window - 1), 0)
        self.keys, self.values = keys[:, :, start:], values[:, :, start:]
        self.seen = self.seen + key_states.shape[-2]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many positions are seen by the next step, and which is the first."""
        kept = self._count_kept()
        return kept + query_length, self.seen - kept

    def get_seq_length(self) -> int:
        """Return how many positions there were."""
        return self.seen

    def _count_kept(self) -> int:
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() == 4 else 0


class WindowCache(DynamicCache):
    """A cache of full layers and of layers with a window.

    Args:
        windows: Of each layer, its window; None: it keeps every position.
        tensors: (key, value, key, value, ...), two for each layer; none: it is empty.
    """

    layers: Any

    def __init__(self, windows: Sequence[int | None], tensors: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.windows = tuple(windows)
        self.layer_class_to_replicate = None
        make_full: Any = DynamicLayer
        self.layers = [make_full() if w is None else WindowLayer(w) for w in self.windows]
        for layer, keys, values in zip(self.layers, tensors[0::2], tensors[1::2], strict=False):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values

    def rebuild(self, tensors: Sequence[Tensor]) -> WindowCache:
        """Return such a cache of other tensors."""
        return WindowCache(self.windows, tensors)

    def arrange(self, arguments: dict[str, Any]) -> None:
        """Learn from the attention mask how many positions there were."""
        new = arguments["position_ids" if "position_ids" in arguments else "input_ids"].shape[-1]
        seen = arguments["attention_mask"].shape[-1] - new
        for layer in self.layers:
            if isinstance(layer, WindowLayer):
                layer.seen = seen

    def empty(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return what the tensors of an empty cache are."""
        return [tensor[:, :, :0] for tensor in tensors]

    def list_dims(self) -> dict[str, int | str]:
        """Return the size of the axis of positions, by name of a tensor."""
        return {
            f"past_key_values.{index}.{kind}": bound_dim(PAST, window - 1) if window else PAST
            for index, window in enumerate(self.windows)
            for kind in ("key", "value")
        }
