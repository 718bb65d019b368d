"""The closed form of `inv_freq` of every rope type, in float64, sharing no code with the types.

It starts from the values in a manifest, so an error that a module and its export share is caught.
Each frequency comes with what float32 makes of it: `spread`, a bound of the relative error by its
exponent and other inputs that are rounded first, in units of 2 ** -24. The roundings of the few
operations that follow are the tolerance `formula`.

Notation: R: rotary_dim, n: number of lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from rotary_export.proof.comparison import Error, compare
from rotary_export.proof.oracle import Expected, compute_ulp
from rotary_export.proof.report import FORMULA, Row
from rotary_export.proof.tolerances import TOLERANCES
from rotary_export.types import Array

Values = Mapping[str, Any]  # of a rope, as a manifest contains them


class _Frequencies(NamedTuple):
    """Frequencies and their spread, (R/2,) or (n, R/2)."""

    value: Array
    spread: Array


def compute_inv_freq(rope: Values, lengths: Array, dtype: str = "float32") -> Expected:
    """Compute the frequencies of a rope type.

    Args:
        rope: As `RopeParameters.to_dict`.
        lengths: (n,), actual sequence lengths; of a type that depends on no length any numbers.
        dtype: What they are stored in.

    Returns:
        (n, R/2).
    """
    found = FORMULAS[rope["rope_type"]](rope, np.asarray(lengths)[:, None])
    shape = (len(lengths), found.value.shape[-1])
    value, spread = (np.broadcast_to(part, shape) for part in found)
    return _expect(value, spread, dtype)


def compute_plain_inv_freq(arguments: Values) -> Expected:
    """Compute the frequencies of a `RotaryEmbedding`, (R/2,), from its arguments."""
    dim = arguments["dim"]
    base = arguments["base"] * arguments["base_rescale_factor"] ** (dim / (dim - 2))
    return _expect(*_compute_theta(base, dim))


def compute_zeta(arguments: Values) -> Expected:
    """Compute xPos's zeta of a `RotaryEmbedding`, (R/2,)."""
    dim = arguments["dim"]
    zeta = (np.arange(dim // 2) / (dim / 2) + 0.4) / 1.4
    return _expect(zeta, np.zeros(dim // 2))


def compute_attention_factor(rope: Values, length: int) -> float:
    """Return the factor of cos and sin at a length; most types have none."""
    of_long = rope.get("long_attention_factor")
    if of_long is not None and length > rope["original_max_position_embeddings"]:
        return float(of_long)
    return float(rope.get("attention_factor", 1.0))


def list_lengths(rope: Values, rows: int) -> Array:
    """List one length for each row of a `ScaledRotaryEmbedding`'s buffer."""
    boundary = rope.get("original_max_position_embeddings", 0)
    if rope["rope_type"] == "dynamic":
        boundary = rope["max_position_embeddings"]
    return np.concatenate(([0], boundary + np.arange(1, rows)))


def compare_formula(name: str, got: Array, expected: Expected, source: str) -> Row:
    """Compare a buffer with its closed form.

    Args:
        name: Of the buffer.
        got: Its values, float32 or wider.
        expected: As `got`.
        source: What the formula is of, for the text of an error.

    Returns:
        A row of the report.
    """
    row = Row("tables", name, FORMULA, "", "exact", "formula")
    row.oracle = compare(got, expected.value, expected.unit)
    row.case = _describe_worst(name, got, expected.value, row.oracle, source)
    return row


def _describe_worst(name: str, got: Array, want: Array, error: Error, source: str) -> str:
    if got.shape != want.shape:
        return f"{name} has shape {got.shape}, the formula of {source} gives {want.shape}"
    index = error.worst or (0,) * got.ndim
    at = ", ".join(map(str, index))
    return f"{name}[{at}] is {got[index]:.9g}, the formula of {source} gives {want[index]:.9g}"


def _expect(value: Array, spread: Array, dtype: str = "float32") -> Expected:
    """Return the values, and the units of which the tolerance is the sum of all roundings."""
    ulp = compute_ulp(value, dtype)
    return Expected(value, ulp, ulp * (1 + spread / TOLERANCES["formula"].max_ulp))


def _compute_theta(base: float | Array, dim: int) -> _Frequencies:
    """Compute base ** (-2i / dim); a rounded exponent changes it by as much times ln(base)."""
    exponent = np.arange(0, dim, 2) / dim
    log = np.abs(np.log(base))
    return _Frequencies(np.power(np.float64(1) * base, -exponent), exponent * log)


def _compute_default(rope: Values, lengths: Array) -> _Frequencies:
    return _compute_theta(rope["base"], rope["dim"])


def _compute_linear(rope: Values, lengths: Array) -> _Frequencies:
    theta, spread = _compute_theta(rope["base"], rope["dim"])
    return _Frequencies(theta / rope["factor"], spread)


def _compute_dynamic(rope: Values, lengths: Array) -> _Frequencies:
    """The base grows with the length, so that the slowest pair turns `stretch` times slower."""
    dim, factor, trained = rope["dim"], rope["factor"], rope["max_position_embeddings"]
    ratio = np.maximum(lengths / trained, 1.0)  # (n, 1)
    stretch, power = factor * (ratio - 1) + 1, dim / (dim - 2)
    theta, spread = _compute_theta(rope["base"] * stretch**power, dim)
    # In float32, factor * ratio is rounded before factor - 1 is subtracted: what cancels is lost.
    rounded = (3 * factor * ratio + factor) / stretch + 1 + np.log(stretch)
    exponent = np.arange(0, dim, 2) / dim
    return _Frequencies(theta, spread + np.where(ratio > 1, power * rounded + 4, 0) * exponent)


def _compute_yarn(rope: Values, lengths: Array) -> _Frequencies:
    """Pairs of more than beta_fast turns are kept, of less than beta_slow divided by factor."""
    base, dim, factor = rope["base"], rope["dim"], rope["factor"]
    theta, spread = _compute_theta(base, dim)

    def find_pair(turns: float) -> float:  # whose wavelength fits so often into the length
        log: float = math.log(rope["original_max_position_embeddings"] / (2 * math.pi * turns))
        pair: float = log * dim / (2 * math.log(base))
        return pair

    low, high = find_pair(rope["beta_fast"]), find_pair(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = 0.001 if low == high else high - low
    ramp = (np.arange(dim // 2) - low) / width
    divided = np.clip(ramp, 0, 1)
    return _blend(theta, spread, 1 - divided, (abs(low) + width) / abs(width) + 2, ramp, factor)


def _compute_longrope(rope: Values, lengths: Array) -> _Frequencies:
    """Each pair has a divisor for short lengths and one for long ones."""
    theta, spread = _compute_theta(rope["base"], rope["dim"])
    is_long = lengths > rope["original_max_position_embeddings"]
    divisor = np.where(is_long, np.asarray(rope["long_factor"]), np.asarray(rope["short_factor"]))
    return _Frequencies(theta / divisor, spread)


def _compute_llama3(rope: Values, lengths: Array) -> _Frequencies:
    """As yarn, but linear in the turns that a pair makes in the original length."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    theta, spread = _compute_theta(rope["base"], rope["dim"])
    turns = theta * rope["original_max_position_embeddings"] / (2 * np.pi)
    ramp = (turns - low) / (high - low)
    rounded = (turns * (spread + 8) + low) / (high - low) + 2
    return _blend(theta, spread, np.clip(ramp, 0, 1), rounded, ramp, rope["factor"])


def _blend(
    theta: Array, spread: Array, keep: Array, rounded: float | Array, ramp: Array, factor: float
) -> _Frequencies:
    """Keep a share of theta and divide the rest by factor; `rounded`: the spread of the ramp."""
    share = keep + (1 - keep) / factor
    within = np.abs(ramp - 0.5) < 0.5 + rounded * 2.0**-24
    return _Frequencies(
        theta * share, spread + within * rounded * np.abs(1 - 1 / factor) / np.abs(share)
    )


def _compute_proportional(rope: Values, lengths: Array) -> _Frequencies:
    """The first pairs turn, the others don't."""
    theta, spread = _compute_theta(rope["base"], rope["dim"])
    turns = np.arange(len(theta)) < rope["rotated_pairs"]
    return _Frequencies(turns * theta / rope["factor"], spread)


def _compute_axial(rope: Values, lengths: Array) -> _Frequencies:
    """The axes of an image have the same frequencies, but for "even-odd", which shares them out."""
    return _Frequencies(
        *(
            _assign_columns(part, rope["axis_layout"])
            for part in _compute_theta(rope["base"], rope["dim"])
        )
    )


def _assign_columns(of_one_axis: Array, layout: str) -> Array:
    if layout == "even-odd":
        return np.concatenate((of_one_axis[::2], of_one_axis[1::2]))
    if layout == "alternating":
        return np.repeat(of_one_axis, 2)
    return np.tile(of_one_axis, 3 if layout == "three-axes" else 2)


FORMULAS: dict[str, Callable[[Values, Array], _Frequencies]] = {
    "axial": _compute_axial,
    "default": _compute_default,
    "dynamic": _compute_dynamic,
    "linear": _compute_linear,
    "llama3": _compute_llama3,
    "longrope": _compute_longrope,
    "proportional": _compute_proportional,
    "yarn": _compute_yarn,
}
