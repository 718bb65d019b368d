"""The float64 oracle: the rotary formulas once more, in numpy, sharing no code with the rest.

A rotation is a complex product here: (a + ib) (cos + i sin) scale. Float64 graphs get numpy's long
double. Each result comes with the units that errors are counted in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from rotary_export.graphs.config import ExportConfig
from rotary_export.types import Array, Arrays

# (smallest normal exponent, bits after the leading one)
_FORMATS = {
    "float16": (-14, 10),
    "bfloat16": (-126, 7),
    "float32": (-126, 23),
    "float64": (-1022, 52),
}


class Expected(NamedTuple):
    """What an output should be.

    Attributes:
        value: In float64 or long double.
        ulp: Spacing of the output's dtype at value; for `rotate`, at the largest magnitude in the
            head vector, since a rotation's rounding is relative to the vector that it turns, not
            to an element of it that happens to cancel.
        unit: `ulp`, enlarged where float32 inputs of a function (an angle, an exponent) are
            rounded before it: the unit for comparisons with `value`.
    """

    value: Array
    ulp: Array
    unit: Array


def compute_ulp(value: Array, dtype: str) -> Array:
    """Return the spacing of dtype's numbers at |value|.

    Args:
        value: Any shape, in a type at least as wide as dtype.
        dtype: "float16", "bfloat16", "float32" or "float64".

    Returns:
        As value.
    """
    lowest, bits = _FORMATS[dtype]
    _, exponent = np.frexp(np.abs(value))  # |value| = m * 2**exponent, m in [0.5, 1)
    exponent = np.where(value == 0, lowest, np.maximum(exponent - 1, lowest))
    return np.asarray(np.ldexp(np.ones((), value.dtype), exponent - bits))


class TableTolerances(NamedTuple):
    """The names of the tolerances of one output of `tables`.

    Attributes:
        inexact: Against eager, in a runtime whose functions differ from torch's.
        oracle: Against the oracle.
    """

    inexact: str
    oracle: str


class Oracle:
    """Computes both graphs of a bundle from its stored inv_freq, zeta and tables.

    Args:
        config: Of the export.
        tables: Stored buffers of the graph `tables`: inv_freq, and scale (zeta) with xPos.
        rotate: Stored buffers of the graph `rotate`: cos_cache, sin_cache, scale_cache.

    Attributes:
        table_tolerances: By output of `tables`.
        length_boundary: The longest length with the first frequencies; None: every length has the
            same.
        computes_tables: Whether `rotate` computes cos and sin, which can't be stored.
    """

    table_tolerances: ClassVar[Mapping[str, TableTolerances]] = {
        "freqs": TableTolerances("exact", "oracle-freqs"),
        "scale": TableTolerances("scale", "oracle-scale"),
    }
    length_boundary: int | None = None
    computes_tables = False

    def __init__(self, config: ExportConfig, tables: Arrays, rotate: Arrays) -> None:
        self._config = config
        self._arguments: Mapping[str, Any] = config.rope.to_dict()
        self._wide = np.dtype(np.longdouble if config.dtype == "float64" else np.float64)
        self._inv_freq = tables["inv_freq"].astype(self._wide)
        self._zeta = tables["scale"].astype(self._wide) if "scale" in tables else None
        self._rotate = {name: table.astype(self._wide) for name, table in rotate.items()}

    def run(self, graph: str, inputs: Sequence[Array]) -> list[Expected]:
        """Compute the outputs of a graph.

        Args:
            graph: "tables" or "rotate".
            inputs: Its inputs, in order.

        Returns:
            What each output should be.
        """
        if graph == "tables":
            return self._compute_tables(int(inputs[0]))
        query, key, position = inputs
        if self._config.static:
            rows = np.arange(self._config.max_seq_len)
            position = np.where(rows < position, rows, len(rows))[None]
        tables = {name: table[position][:, None] for name, table in self._rotate.items()}
        turn = tables["cos_cache"] + 1j * tables["sin_cache"]  # (B or 1, 1, S, R/2)
        scale = tables.get("scale_cache", np.ones((), self._wide))
        return [self._turn(query, turn * scale), self._turn(key, turn / scale)]

    def stored(self, name: str) -> Expected:
        """Compute a stored table: cos_cache, sin_cache or scale_cache."""
        half = len(self._inv_freq)
        freqs, scale = self._compute_tables(self._config.max_seq_len)
        if name == "scale_cache":
            expected, identity = Expected(*(part[:, :half] for part in scale)), 1.0
        else:
            angle = freqs.value[:, :half]
            value = np.cos(angle) if name == "cos_cache" else np.sin(angle)
            # The rounding of the angle becomes an absolute error of its cosine.
            unit = compute_ulp(np.maximum(np.abs(angle), 1), "float32")
            expected, identity = Expected(value, unit, unit), 1.0 if name == "cos_cache" else 0.0
        if not self._config.static:
            return expected
        row = self._plain(np.full((1, half), identity, self._wide))  # the identity
        return Expected(*(np.concatenate(parts) for parts in zip(expected, row, strict=True)))

    def _plain(self, value: Array) -> Expected:
        ulp = compute_ulp(value, "float32")
        return Expected(value, ulp, ulp)

    def _compute_tables(self, seq_len: int) -> list[Expected]:
        rows = np.arange(self._config.max_seq_len).astype(self._wide)[:, None]
        keep = rows < seq_len
        freqs = rows / self._wide.type(self._arguments["interpolation_factor"]) * self._inv_freq
        tables = [self._plain(np.tile(np.where(keep, freqs, 0), 2))]  # (max_seq_len, R)
        if self._zeta is None:
            return [*tables, self._plain(np.ones((), self._wide))]
        power = (rows - seq_len // 2) / self._wide.type(self._arguments["scale_base"])
        exponent = np.tile(np.where(keep, power * np.log(self._zeta), 0), 2)
        scale = np.exp(exponent)
        ulp = compute_ulp(scale, "float32")
        # The rounding of the exponent becomes a relative error as large as the exponent is.
        return [*tables, Expected(scale, ulp, ulp * (1 + np.abs(exponent)))]

    def _turn(self, x: Array, turn: Array) -> Expected:
        """Turn the pairs of x."""
        out = x.astype(self._wide)
        half = turn.shape[-1]
        if self._config.interleaved:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        else:
            first, second = slice(0, half), slice(half, 2 * half)
        turned = (out[..., first] + 1j * out[..., second]) * turn
        out[..., first], out[..., second] = turned.real, turned.imag
        largest = np.abs(out).max(axis=-1, keepdims=True)
        ulp = compute_ulp(largest, self._config.dtype)
        return Expected(out, ulp, ulp)
