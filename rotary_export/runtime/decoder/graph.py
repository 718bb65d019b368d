"""One run of a decoder's graph, on memory that stays bound from one token to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rotary_export.bundle.dims import (
    BATCH,
    PAST,
    SEQ,
    TOTAL,
    is_encoded,
    is_past,
    name_output,
)
from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.compat.ort_binding import make_binder
from rotary_export.errors import RotaryExportError
from rotary_export.runtime.decoder.cache import GrowingCache, StaticCache
from rotary_export.runtime.ort import OrtSession
from rotary_export.runtime.providers import CPU
from rotary_export.runtime.session import resolve_shape
from rotary_export.runtime.tensors import ELEMENT_TYPES, make_dtype
from rotary_export.types import Array

MASK, POSITIONS, EMBEDS = "attention_mask", "position_ids", "inputs_embeds"


class DecoderGraph:
    """Runs a graph with a key/value cache.

    Args:
        session: Of the graph.
        max_cache_len: Slots of a static cache; None: it grows.
        embed: Of the graph that embeds tokens, where this one reads embeddings.

    Raises:
        RotaryExportError: The graph has no cache, or inputs that a loop can't fill.
    """

    def __init__(
        self,
        session: OrtSession,
        max_cache_len: int | None = None,
        embed: OrtSession | None = None,
    ) -> None:
        graph = session.graph
        self._session, self._embed = session, embed
        self.has_mask = any(info.name == MASK for info in graph.inputs)
        self._has_positions = any(info.name == POSITIONS for info in graph.inputs)
        self._tokens = find_tokens(graph, embed)
        self._logits = find_logits(graph)
        check_growth(graph)
        self.num_tokens = count_tokens(
            embed.graph.inputs[0] if embed else self._tokens, self._logits
        )
        caches = [info for info in graph.inputs if is_past(info.name)]
        # ONNX Runtime's CPU kernel that writes slots may write its own input; others need not.
        in_place = session.providers == (CPU,)
        self.cache = StaticCache(caches, in_place) if max_cache_len else GrowingCache(caches)
        self._binder = make_binder(session.ort_session)
        self._bound: tuple[int, int] | None = None  # batch_size, seq_len of the buffers below
        self._buffers: dict[str, Array] = {}
        dtype = next((info.dtype for info in graph.inputs if info.name == MASK), "int64")
        self._mask, self._mask_element = np.empty(0, make_dtype(dtype)), ELEMENT_TYPES[dtype]
        self._bound_mask: tuple[int, ...] = ()
        self._encoded_names = [info.name for info in graph.inputs if is_encoded(info.name)]
        self._encoded: dict[str, Array] = {}  # what the encoder returned
        self._rows: dict[str, Array] = {}  # the same, in the order of the batch

    def set_encoded(self, outputs: Mapping[str, Any]) -> int:
        """Keep what an encoder returned; return how many rows it has."""
        found = {name.replace("present", "past_key_values", 1): v for name, v in outputs.items()}
        if missing := [name for name in self._encoded_names if name not in found]:
            raise RotaryExportError(
                f"an encoder must return what its decoder reads, got no {', '.join(missing)}"
            )
        self._encoded = {name: np.ascontiguousarray(found[name]) for name in self._encoded_names}
        return len(next(iter(self._encoded.values())))

    def check_encoded(self, batch_size: int) -> None:
        """Refuse a batch of other rows than were encoded."""
        if not self._encoded_names:
            return
        if not self._encoded:
            raise RotaryExportError("encode must come first: the model is an encoder-decoder")
        size = len(next(iter(self._encoded.values())))
        if size != batch_size:
            raise RotaryExportError(
                f"input_ids must have as many rows as encode has read, {size}, got {batch_size}"
            )

    def begin(self, batch_size: int, length: int) -> None:
        """Begin a batch that will grow to so many positions."""
        self.cache.begin(batch_size, length)
        if self._encoded_names:
            self._rows, self._bound = self._encoded, None

    def reorder(self, order: Array, batch_size: int, past: int) -> None:
        """Replace row i by row order[i]; there may be more or fewer rows than before."""
        self.cache.reorder(order, batch_size, past)
        if self._encoded_names:
            self._rows = {name: value[order] for name, value in self._rows.items()}
            self._bound = None

    def run(self, ids: Array, positions: Array, mask: Array, past: int) -> Array:
        """Run the graph once, and make its cache the past of the next run.

        Args:
            ids: (B, S) int64.
            positions: (B, S) int64.
            mask: (B, past + S) int64; with a static cache (B, max_cache_len).
            past: How many positions the cache holds; a static one ignores it.

        Returns:
            (B, V), the logits of the last position; the next run overwrites them.
        """
        batch_size, seq_len = ids.shape
        if self._bound != (batch_size, seq_len):
            self._bind(batch_size, seq_len)
        buffer = self._buffers[self._tokens.name]
        buffer[...] = self._embed(input_ids=ids)[EMBEDS] if self._embed else ids
        if self._has_positions:
            self._buffers[POSITIONS][...] = positions
        if self.has_mask:
            self._bind_mask(mask)
        self.cache.bind(self._binder, batch_size, past, past + seq_len)
        self._session.run_bound(self._binder.binding)
        self.cache.advance()
        logits: Array = self._buffers[self._logits.name][:, -1]
        return logits

    def _bind(self, batch_size: int, seq_len: int) -> None:
        """Bind what depends on the number of new tokens alone."""
        sizes = {BATCH: batch_size, SEQ: seq_len, PAST: 0}
        self._bound = None
        for info in self._session.graph.inputs:
            if info.name in (self._tokens.name, POSITIONS):
                self._binder.bind_input(info.name, *self._allocate(info, sizes))
        for name, value in self._rows.items():
            form = ELEMENT_TYPES[value.dtype.name], value.shape, value.ctypes.data
            self._binder.bind_input(name, *self._binder.device, *form)
        self._binder.bind_output(self._logits.name, *self._allocate(self._logits, sizes))
        self._bound = batch_size, seq_len

    def _allocate(self, info: TensorInfo, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        shape = resolve_shape(info, sizes)
        self._buffers[info.name] = buffer = np.empty(shape, make_dtype(info.dtype))
        return *self._binder.device, ELEMENT_TYPES[info.dtype], shape, buffer.ctypes.data

    def _bind_mask(self, mask: Array) -> None:
        if self._mask.size < mask.size:
            self._mask, self._bound_mask = np.empty(2 * mask.size, self._mask.dtype), ()
        self._mask[: mask.size].reshape(mask.shape)[...] = mask
        if mask.shape != self._bound_mask:
            self._bound_mask = mask.shape
            form = self._mask_element, mask.shape, self._mask.ctypes.data
            self._binder.bind_input(MASK, *self._binder.device, *form)


def find_tokens(graph: GraphInfo, embed: OrtSession | None = None) -> TensorInfo:
    """Return the input of the token ids, or of their embeddings.

    Raises:
        RotaryExportError: The graph has no cache, or inputs that a loop can't fill.
    """
    caches = [info for info in graph.inputs if is_past(info.name)]
    others = [info for info in graph.inputs if info not in caches]
    others = [info for info in others if info.name not in (MASK, POSITIONS)]
    others = [info for info in others if not is_encoded(info.name)]
    if not caches:
        raise RotaryExportError(
            "the graph has no key/value cache: export the model with one (--cache full) to generate"
        )
    is_embedded = embed is not None and [info.name for info in others] == [EMBEDS]
    is_ids = len(others) == 1 and others[0].dtype == "int64" and len(others[0].shape) == 2
    if not (is_embedded or is_ids):
        raise RotaryExportError(
            "a decoder must have token ids, attention_mask and position_ids as inputs besides its "
            f"cache, got {', '.join(info.name for info in others) or 'no token ids'}"
        )
    for info in graph.inputs:
        # Text has the same position on each of three axes.
        axes = info.shape[:-2] if info.name == POSITIONS and info.shape[0] == 3 else ()
        if info.name in (MASK, POSITIONS) and len(info.shape) != 2 + len(axes):
            raise RotaryExportError(
                f"{info.name} of a decoder must have 2 dimensions, got shape {info.shape}"
            )
    return others[0]


def find_logits(graph: GraphInfo) -> TensorInfo:
    """Return the output of the logits.

    Raises:
        RotaryExportError: There are other outputs, besides the cache.
    """
    presents = {name_output(info.name) for info in graph.inputs if is_past(info.name)}
    others = [info for info in graph.outputs if info.name not in presents]
    if len(others) != 1 or len(others[0].shape) != 3 or len(graph.outputs) != len(presents) + 1:
        raise RotaryExportError(
            "a decoder must have logits and its grown cache as outputs, got "
            f"{', '.join(info.name for info in graph.outputs)}"
        )
    return others[0]


def check_growth(graph: GraphInfo) -> None:
    """Refuse a graph whose runs append another number of positions than they have tokens.

    Raises:
        RotaryExportError: It is one.
    """
    shapes = {info.name: info.shape for info in graph.outputs}
    for info in graph.inputs:
        name = name_output(info.name)
        if is_past(info.name) and info.shape[2] == PAST and shapes[name][2] != TOTAL:
            raise RotaryExportError(
                f"a decoder must append each token of a run to its cache, {name} has the length "
                f"{shapes[name][2]} after {PAST} (x-transformers: export with cache_age=0)"
            )


def count_tokens(tokens: TensorInfo, logits: TensorInfo) -> int:
    """Return how many tokens the model knows.

    Raises:
        RotaryExportError: The graph does not tell.
    """
    size = logits.shape[2]
    if tokens.limits is not None:
        return tokens.limits[1] + 1
    if not isinstance(size, int):
        raise RotaryExportError(f"{logits.name} must have a fixed number of tokens, got {size!r}")
    return size


def find_room(config: Mapping[str, Any]) -> tuple[int | None, str]:
    """Return how many tokens a row may have, and what has so many positions: model or cache.

    Args:
        config: Of a bundle's manifest.

    Returns:
        The number, None: any; and "model" or "cache", for errors.
    """
    facts = config.get("decoder", {})
    most: int | None = facts.get("max_positions", config.get("max_positions"))
    slots: int | None = facts.get("max_cache_len")
    if slots is not None and slots <= (most or slots):
        return slots, "cache"
    return most, "model"
