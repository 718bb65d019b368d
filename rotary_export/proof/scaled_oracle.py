"""The float64 oracle of Hugging Face's rope types.

From the rope type it reads data alone: the length boundary and the layout of the axes. What is
computed from these shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from rotary_export.graphs.config import ExportConfig
from rotary_export.proof.formulas import compute_attention_factor
from rotary_export.proof.oracle import Expected, Oracle, TableTolerances, compute_ulp
from rotary_export.rope.rope_types import from_dict
from rotary_export.types import Array, Arrays


class ScaledOracle(Oracle):
    """Computes both graphs from the stored frequencies and tables.

    Args:
        config: Of the export of a `ScaledRotaryEmbedding`.
        tables: Stored buffers of the graph `tables`: inv_freq, (n, R/2).
        rotate: Stored buffers of the graph `rotate`: cos_cache and sin_cache, or inv_freq.
    """

    table_tolerances: ClassVar[Mapping[str, TableTolerances]] = {
        name: TableTolerances("cos-sin", "oracle-angle") for name in ("cos_cache", "sin_cache")
    }

    def __init__(self, config: ExportConfig, tables: Arrays, rotate: Arrays) -> None:
        super().__init__(config, tables, rotate)
        self._rope = from_dict(self._arguments)
        self._last = config.max_seq_len
        boundary = self._rope.length_boundary
        self.length_boundary = boundary if boundary is not None and boundary < self._last else None
        self.computes_tables = "cos_cache" not in rotate
        self._axes = self._find_axes()

    def run(self, graph: str, inputs: Sequence[Array]) -> list[Expected]:
        """Compute the outputs of a graph; as `Oracle.run`."""
        rows = np.arange(self._last)
        if graph == "tables":
            length = int(inputs[0])
            cos, sin = self._compute_cos_sin(rows, length)
            keep = (rows < length)[:, None]
            return [
                Expected(np.where(keep, table.value, still), table.ulp, table.unit)
                for table, still in ((cos, 1), (sin, 0))
            ]
        query, key, position = inputs
        if self._config.static:
            length, keep = int(position), (rows < position)[None, None, :, None]
            position = rows[None]
        else:
            length, keep = int(position.max(initial=0)) + 1, np.ones((1, 1, 1, 1), bool)
        if self.computes_tables:
            cos, sin = self._compute_cos_sin(position, length)
            turn = np.where(keep, (cos.value + 1j * sin.value)[:, None], 1)  # (B or 1, 1, S, R/2)
            slack = cos.ulp[:, None], cos.unit[:, None]
            return [self._turn_within(x, turn, *slack) for x in (query, key)]
        turn = np.where(keep, self._look_up(position, length)[:, None], 1)
        return [self._turn(x, turn) for x in (query, key)]

    def stored(self, name: str) -> Expected:
        """Compute a stored table: inv_freq, cos_cache or sin_cache."""
        if name == "inv_freq":
            return self._plain(self._inv_freq)
        which = 0 if name == "cos_cache" else 1
        parts = [self._compute_cos_sin(np.arange(self._last), self._last)[which]]
        if self.length_boundary is not None:
            rows = np.arange(self.length_boundary)
            parts.insert(0, self._compute_cos_sin(rows, self.length_boundary)[which])
        if self._config.static:  # the identity
            row = np.full((1, self._inv_freq.shape[1]), 1.0 - which, self._wide)
            parts.append(self._plain(row))
        return Expected(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def _find_axes(self) -> Array | None:
        """Return which axis of the positions each column has."""
        half = self._inv_freq.shape[1]
        column, section = np.arange(half), np.asarray(self._rope.mrope_section)
        layout = self._rope.axis_layout
        if not layout:
            return None
        if layout == "chunked":
            return np.searchsorted(np.cumsum(section), column, side="right") % 3
        if layout == "interleaved":
            third = column % 3
            return np.where(column < 3 * section[third], third, 0)
        if layout == "pairs-first":
            return np.where(column < section[:2].sum(), 1 + column % 2, 0)
        if layout == "alternating":
            return np.asarray(1 - column % 2)
        axis = column * (3 if layout == "three-axes" else 2) // half
        return np.asarray(1 - axis if layout == "columns-first" else axis)

    def _find_frequencies(self, length: int) -> tuple[Array, float]:
        """Return the frequencies and the attention factor of a length."""
        past = 0 if self.length_boundary is None else max(0, length - self.length_boundary)
        if not self._rope.varies_past_boundary:
            past = min(past, 1)
        return self._inv_freq[past], compute_attention_factor(self._arguments, length)

    def _compute_cos_sin(self, positions: Array, length: int) -> tuple[Expected, Expected]:
        """Compute cos and sin of positions (S,), (B, S) or (A, B, S)."""
        inv_freq, factor = self._find_frequencies(length)
        steps = positions[..., None].astype(self._wide)
        if positions.ndim == 3 and self._axes is not None:
            steps = np.moveaxis(positions[self._axes], 0, -1).astype(self._wide)
        angle = steps * inv_freq
        # The rounding of the angle becomes an absolute error of its cosine.
        unit = compute_ulp(np.maximum(np.abs(angle), 1), "float32") * max(1, factor)
        ulp = np.broadcast_to(compute_ulp(np.asarray(factor, self._wide), "float32"), unit.shape)
        cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
        return Expected(cos, ulp, unit), Expected(sin, ulp, unit)

    def _look_up(self, positions: Array, length: int) -> Array:
        """Return cos + i sin of positions from the stored tables."""
        rows = positions
        if self.length_boundary is not None and length > self.length_boundary:
            rows = positions + self.length_boundary
        turn = self._rotate["cos_cache"] + 1j * self._rotate["sin_cache"]
        if positions.ndim == 2 or self._axes is None:
            return np.asarray(turn[rows])
        by_axis = turn[rows]  # (A, B, S, R/2)
        return np.asarray(by_axis[self._axes, ..., np.arange(len(self._axes))].transpose(1, 2, 0))

    def _turn_within(self, x: Array, turn: Array, ulp: Array, unit: Array) -> Expected:
        """Turn the pairs of x by a turn that is computed, known to ulp (in eager) and unit."""
        turned = self._turn(x, turn)
        largest = np.abs(x.astype(self._wide)).max(axis=-1, keepdims=True)
        near, far = (part.max(axis=-1, keepdims=True) * largest for part in (ulp, unit))
        return Expected(turned.value, turned.ulp + near, turned.ulp + 2 * far)
