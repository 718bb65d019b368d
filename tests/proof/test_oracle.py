"""What the proof rests on: the comparison, the oracle and the units that errors are counted in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.bundles import get_bundle, make_arrays, make_rope

from rotary_export import RotaryQueryKey
from rotary_export.graphs.config import read_config
from rotary_export.proof.comparison import Error, compare
from rotary_export.proof.oracle import Oracle, compute_ulp
from rotary_export.proof.report import Report, Row
from rotary_export.proof.stored import read_constants

# ---- the comparison

UNIT = np.full(4, 2.0**-23)
NAN, INF = math.nan, math.inf
BASE = (1.0, -0.0, 2.0, 3.0)
STEP = float(np.spacing(np.float32(1)))
# got, want -> max_abs, max_ulp, exact, worst
COMPARISONS = {
    "equal": (BASE, BASE, Error()),
    "an ulp": ((1 + STEP, -0.0, 2, 3), BASE, Error(STEP, 1.0, False, (0,))),
    "the worst": ((1 + STEP, -0.0, 2, 3 - 4 * STEP), BASE, Error(4 * STEP, 4.0, False, (3,))),
    "a permutation": ((1.0, -0.0, 3.0, 2.0), BASE, Error(1.0, 2.0**23, False, (2,))),
    "zero's sign": ((1.0, 0.0, 2.0, 3.0), BASE, Error(0.0, 0.0, False, (0,))),
    "nan and nan": ((NAN, -0.0, 2, 3), (-NAN, -0.0, 2, 3), Error()),
    "nan got": ((1, -0.0, NAN, 3), BASE, Error(INF, INF, False, (2,))),
    "nan wanted": (BASE, (1, -0.0, 2, NAN), Error(INF, INF, False, (3,))),
    "inf and inf": ((INF, -INF, 2, 3), (INF, -INF, 2, 3), Error()),
    "inf and -inf": ((INF, -0.0, 2, 3), (-INF, -0.0, 2, 3), Error(INF, INF, False, (0,))),
    "inf got": ((1, -0.0, 2, INF), BASE, Error(INF, INF, False, (3,))),
    "shorter": ((1.0, -0.0, 2.0), BASE, Error(INF, INF, False)),
    "broadcastable": ((1.0,), BASE, Error(INF, INF, False)),
}


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_compare(comparison):
    got, want, error = COMPARISONS[comparison]
    got, want = np.array(got, np.float32), np.array(want, np.float32)
    assert compare(got, want, UNIT) == error
    assert got.dtype == want.dtype == np.float32


def test_compare_requires_the_dtype_for_exact():
    got = np.ones(3)
    assert not compare(got, got.astype(np.float32), np.ones(3)).exact
    assert compare(got[:0], got[:0], np.ones(0)) == Error()


def test_errors_merge_to_the_worse():
    small, large = Error(3.0, 1.0, False, (1,)), Error(0.5, 2.0, False, (2,))
    for merged in (small.merge(large), large.merge(small)):
        assert merged == Error(3.0, 2.0, False, (2,))
    assert Error().merge(Error()) == Error()
    assert not Error().merge(Error(exact=False)).exact  # a zero's sign


def test_a_row_passes_within_both_tolerances_only():
    exact = Error()

    def make(eager=exact, oracle=exact, tolerance="exact"):
        return Row("g", "o", "r", "k", tolerance, "oracle-rotate", eager, oracle)

    assert make(oracle=Error(1, 2.0, False)).passed
    assert not make(oracle=Error(1, 2.001, False)).passed
    assert not make(oracle=Error(1, NAN, False)).passed
    assert not make(eager=Error(exact=False)).passed  # 0 ulp, but a zero's sign
    assert make(eager=Error(1, 4.0, False), tolerance="native").passed
    assert not make(eager=Error(1, 4.001, False), tolerance="native").passed
    assert Report([make()]).passed
    assert not Report([make(), make(eager=Error(exact=False))]).passed


# ---- the oracle


@pytest.mark.parametrize("name", ["plain", "xpos", "static", "float64"])
def test_the_oracle_is_the_rotation(name):
    """Against cos, sin and powers of numpy's long double, channel by channel."""
    wide = np.longdouble
    rope = make_rope(name)
    config = read_config(get_bundle(name).manifest.config)
    inv_freq = rope.inv_freq.numpy()
    zeta = None if rope.scale is None else rope.scale.numpy()
    rotate = RotaryQueryKey(rope)
    angles = np.arange(33)[:, None] / wide(rope.interpolation_factor) * inv_freq.astype(wide)
    angles[32] = 0
    power = ((np.arange(33) - 16) / wide(512))[:, None]
    power[32] = 0
    scales = np.ones((33, 8), wide) if zeta is None else zeta.astype(wide) ** power
    tables = {"cos_cache": np.cos(angles), "sin_cache": np.sin(angles), "scale_cache": scales}
    rows = slice(None) if config.static else slice(32)
    oracle = Oracle(
        config,
        {"inv_freq": inv_freq} | ({} if zeta is None else {"scale": zeta}),
        {key: table[rows] for key, table in tables.items()},
    )
    for key, table in tables.items():
        if key == "scale_cache" and zeta is None:
            continue
        truth = oracle.stored(key)
        assert np.abs(truth.value - table[rows]).max() < 1e-14
        stored = getattr(rotate, key).numpy()
        assert (np.abs(stored - truth.value[:32]) <= 2 * truth.unit[:32]).all()

    inputs = make_arrays(name, seq_len=11)
    position = inputs.get("position_ids")
    if position is None:
        position = np.where(np.arange(32) < 11, np.arange(32), 32)[None].repeat(2, 0)
    got = oracle.run("rotate", list(inputs.values()))
    for truth, key, sign in zip(got, ("query", "key"), (1, -1), strict=True):
        x = inputs[key].astype(wide)
        want = x.copy()
        for i in range(8):
            a, b = (2 * i, 2 * i + 1) if config.interleaved else (i, i + 8)
            angle, scale = angles[position, i][:, None], scales[position, i][:, None] ** sign
            want[..., a] = (x[..., a] * np.cos(angle) - x[..., b] * np.sin(angle)) * scale
            want[..., b] = (x[..., b] * np.cos(angle) + x[..., a] * np.sin(angle)) * scale
        assert np.abs(truth.value - want).max() < 1e-14
        largest = np.abs(want).max(-1, keepdims=True).astype(config.dtype)
        assert (truth.ulp == np.spacing(largest)).all()


@pytest.mark.parametrize("length", [0, 1, 16, 32])
def test_the_oracle_has_the_tables(length):
    rope = make_rope("xpos")
    freqs, scale = (value.numpy() for value in rope(torch.tensor(length)))
    tables = {"inv_freq": rope.inv_freq.numpy(), "scale": rope.scale.numpy()}
    config = read_config(get_bundle("xpos").manifest.config)
    truth = Oracle(config, tables, {}).run("tables", [np.array(length)])
    for got, want in zip((freqs, scale), truth, strict=True):
        np.testing.assert_allclose(got, want.value, rtol=1e-6)
        assert (np.abs(got - want.value) <= 2 * want.unit).all()
    assert (truth[0].value[length:] == 0).all()
    assert (truth[1].value[length:] == 1).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_ulp_is_the_spacing(dtype):
    values = np.array([0, 1, -1, 0.75, 1.5, 1e-3, 300, 60000, 6e-8], dtype)
    values = np.append(values, np.nextafter(values, np.array(9, dtype)))
    got = compute_ulp(values.astype(np.longdouble), dtype)
    assert got.tolist() == np.spacing(np.abs(values)).tolist()


def test_stored_tables_are_read_from_every_format():
    for name, info in get_bundle("xpos").manifest.graphs.items():
        by_format = read_constants(get_bundle("xpos").path, info, allow_code=True)
        wanted = {"cos_cache", "sin_cache", "scale_cache"}
        if name == "tables":
            wanted = {"inv_freq", "scale"}
        assert list(by_format) == ["onnx", "torchscript", "program"]
        assert all(set(tables) == wanted for tables in by_format.values())
