"""The float64 oracle of Hugging Face's rope types, sharing no code with what it is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rotary_export.graphs.graphs import ExportConfig
from rotary_export.proof.oracle import Expected, Oracle, compute_ulp

Array = np.ndarray[Any, np.dtype[Any]]


class ScaledOracle(Oracle):
    """Computes both graphs from the stored frequencies and tables.

    Args:
        config: Of the export, with `rope`.
        tables: Stored buffers of the graph `tables`: inv_freq, (n, R/2).
        rotate: Stored buffers of the graph `rotate`: cos_cache and sin_cache, or inv_freq.
    """

    def __init__(
        self, config: ExportConfig, tables: Mapping[str, Array], rotate: Mapping[str, Array]
    ) -> None:
        super().__init__(config, tables, rotate)
        assert config.rope is not None
        self._rope = config.rope
        self._last = config.max_seq_len
        limits = {
            "dynamic": self._rope["max_position_embeddings"],
            "longrope": self._rope["original_max_position_embeddings"],
        }
        limit = limits.get(self._rope["rope_type"])
        self.switch_length = limit if limit is not None and limit < self._last else None
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
                Expected(np.where(keep, truth.value, still), truth.ulp, truth.unit)
                for truth, still in ((cos, 1), (sin, 0))
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
        if self.switch_length is not None:
            rows = np.arange(self.switch_length)
            parts.insert(0, self._compute_cos_sin(rows, self.switch_length)[which])
        if self._config.static:  # the identity
            row = np.full((1, self._inv_freq.shape[1]), 1.0 - which, self._wide)
            parts.append(self._plain(row))
        return Expected(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def _find_axes(self) -> Array | None:
        """Say which axis of the positions each column takes."""
        half = self._inv_freq.shape[1]
        column, section = np.arange(half), self._rope["mrope_section"]
        layout = self._rope["mrope_layout"]
        if self._rope["rope_type"] == "axial":
            if layout == "alternating":
                return np.asarray(1 - column % 2)
            axis = column * (3 if layout == "three-axes" else 2) // half
            return np.asarray(1 - axis if layout == "columns-first" else axis)
        if not section:
            return None
        ends = np.cumsum(section)
        if self._rope["mrope_layout"] == "chunked":
            return np.searchsorted(ends, column, side="right") % 3
        if self._rope["mrope_layout"] == "interleaved":
            third = column % 3
            return np.where(column < 3 * np.asarray(section)[third], third, 0)
        return np.where(column < ends[1], 1 + column % 2, 0)

    def _find_frequencies(self, length: int) -> tuple[Array, float]:
        """Return the frequencies and the attention factor of a length."""
        past = 0 if self.switch_length is None else max(0, length - self.switch_length)
        is_long = past > 0 and self._rope["rope_type"] == "longrope"
        factor = self._rope["attention_factor"]
        if is_long and self._rope["long_attention_factor"] is not None:
            factor = self._rope["long_attention_factor"]
        return self._inv_freq[1 if is_long else past], factor

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
        if self.switch_length is not None and length > self.switch_length:
            rows = positions + self.switch_length
        turn = self._rotate["cos_cache"] + 1j * self._rotate["sin_cache"]
        if positions.ndim == 2 or self._axes is None:
            return np.asarray(turn[rows])
        by_axis = turn[rows]  # (A, B, S, R/2)
        return np.asarray(by_axis[self._axes, ..., np.arange(len(self._axes))].transpose(1, 2, 0))

    def _turn_within(self, x: Array, turn: Array, ulp: Array, unit: Array) -> Expected:
        """Turn the pairs of x by a turn that is computed, known to ulp (in eager) and unit."""
        truth = self._turn(x, turn)
        largest = np.abs(x.astype(self._wide)).max(axis=-1, keepdims=True)
        near, far = (part.max(axis=-1, keepdims=True) * largest for part in (ulp, unit))
        return Expected(truth.value, truth.ulp + near, truth.ulp + 2 * far)
