"""reference.py: the maths, against formulas written anew here."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from helpers.cases import FORMS, TYPES, sweep
from helpers.oracles import assert_same_bits, assert_within, rotate_eagerly

from rotary_export.errors import RotaryExportError
from rotary_export.proof.tolerances import TOLERANCES
from rotary_export.reference import (
    apply_rotary_emb,
    build_freqs,
    build_scale,
    compute_inv_freq,
    compute_zeta,
    rotate,
)

LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
PLAIN = [case for case in FORMS if case.ids == "tables-shared" and not case.flat]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_tables(rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """freqs and scale of (rows, dim), scale not a power of two anywhere."""
    positions = torch.arange(rows)
    freqs = build_freqs(positions, compute_inv_freq(dim))
    return freqs, build_scale(positions, torch.tensor(rows // 2), compute_zeta(dim), 7.0)


# ---- tables


@pytest.mark.parametrize("dim", [4, 6, 64, 130])
@pytest.mark.parametrize(("base", "factor"), [(10000, 1.0), (500000.0, 1.0), (10000, 8.0)])
def test_inv_freq_is_base_to_the_minus_2i_over_dim(dim, base, factor):
    want = [(base * factor ** (dim / (dim - 2))) ** (-2 * i / dim) for i in range(dim // 2)]
    got = compute_inv_freq(dim, base, factor)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-6)  # float32's pow of numbers up to 1e6


def test_ntk_rescaling_stretches_the_lowest_frequency_by_the_factor():
    for factor in (2.0, 8.0):
        ratio = compute_inv_freq(64)[-1] / compute_inv_freq(64, base_rescale_factor=factor)[-1]
        assert float(ratio) == pytest.approx(factor, rel=1e-6)


def test_zeta_is_that_of_xpos():
    zeta = compute_zeta(64)
    np.testing.assert_allclose(zeta.numpy(), [(2 * i + 25.6) / 89.6 for i in range(32)], rtol=1e-7)
    assert float(zeta[0]) == pytest.approx(0.285714, abs=1e-6)


def test_freqs_are_angles_tiled_in_halves():
    freqs = build_freqs(torch.tensor([0, 3, 300]), torch.tensor([1.0, 0.25]), 4.0)
    want = [[0, 0, 0, 0], [0.75, 0.1875, 0.75, 0.1875], [75, 18.75, 75, 18.75]]
    assert freqs.tolist() == want


def test_scale_is_1_at_the_centre_and_falls_by_zeta_per_base():
    zeta = torch.tensor([0.25, 0.5])
    scale = build_scale(torch.arange(5), torch.tensor(2), zeta, 2.0)
    assert scale[2].tolist() == [1.0] * 4
    assert scale[4].tolist() == [0.25, 0.5] * 2
    assert scale[0].tolist() == [4.0, 2.0] * 2


# ---- rotate


@sweep(PLAIN)
def test_rotate_has_the_bits_of_eager_and_is_near_the_oracle(case):
    inputs = case.make_inputs()
    cos, sin = inputs["cos_cache"][:, None], inputs["sin_cache"][:, None]
    scale = inputs["scale_cache"][:, None] if case.scaled else None
    got = rotate(inputs["X"], cos, sin, scale, interleaved=case.interleaved)
    assert_same_bits(got, case.compute_eager(inputs)[0])
    half = got.element_size() == 2
    name = "oracle-half" if half else "oracle-xpos" if case.scaled else "oracle-rotate"
    assert_within(got, case.compute_expected(inputs)[0], TOLERANCES[name].max_ulp)


@LAYOUTS
def test_a_rotation_keeps_lengths_and_relative_angles(interleaved):
    freqs, _ = make_tables(20, 8)
    q, k = draw(8, seed=1).expand(20, 8), draw(8, seed=2).expand(20, 8)
    q, k = (apply_rotary_emb(x.double(), freqs.double(), interleaved=interleaved) for x in (q, k))
    assert torch.allclose(q.norm(dim=-1), q[0].norm(), rtol=1e-12)
    scores = q @ k.T  # depends on the difference of the positions only
    for offset in (-3, 0, 5):
        diagonal = scores.diagonal(offset)
        assert torch.allclose(diagonal, diagonal[0], rtol=1e-5)
    assert scores.diagonal(5)[0] != pytest.approx(float(scores.diagonal(0)[0]), rel=1e-3)


# ---- apply_rotary_emb


@LAYOUTS
@pytest.mark.parametrize("dim", [8, 6], ids=["full", "partial"])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "xpos"])
def test_apply_has_the_bits_of_x_cos_plus_rotate_half_x_sin(interleaved, dim, name, scaled):
    x, (freqs, scale) = draw(2, 3, 5, 8, dtype=TYPES[name]), make_tables(5, dim)
    half = dim // 2
    cos, sin = freqs.cos()[None, :, :half], freqs.sin()[None, :, :half]
    factor = scale[None, :, :half] if scaled else None
    got = apply_rotary_emb(x, freqs, scale if scaled else 1.0, interleaved=interleaved)
    assert_same_bits(got, rotate_eagerly(x, cos, sin, factor, interleaved))


def test_apply_accepts_any_leading_dimensions_and_batched_freqs():
    x, (freqs, scale) = draw(2, 3, 5, 8), make_tables(9, 8)
    rows = torch.tensor([[0, 1, 2, 3, 4], [4, 8, 0, 1, 1]])
    got = apply_rotary_emb(x, freqs[rows][:, None], scale[rows][:, None])  # (B, 1, S, R)
    for batch in range(2):
        for head in range(3):
            want = apply_rotary_emb(x[batch, head], freqs[rows[batch]], scale[rows[batch]])
            assert_same_bits(got[batch, head], want)


def test_a_decoder_passes_the_rows_of_its_tokens():
    x, (freqs, scale) = draw(1, 2, 9, 8), make_tables(9, 8)
    whole = apply_rotary_emb(x, freqs, scale)
    for start, n in ((0, 4), (4, 1), (5, 4)):
        rows = slice(start, start + n)
        got = apply_rotary_emb(x[:, :, rows], freqs[rows], scale[rows])
        assert_same_bits(got, whole[:, :, rows])


@pytest.mark.parametrize("scale", [1.0, 2, 0.5, torch.tensor(0.5)], ids=repr)
def test_a_number_as_scale(scale):
    x, (freqs, _) = draw(5, 8), make_tables(5, 8)
    assert_same_bits(apply_rotary_emb(x, freqs, scale), apply_rotary_emb(x, freqs) * scale)


@LAYOUTS
def test_gradients_reach_x_freqs_and_scale(interleaved):
    freqs, scale = (t.double().requires_grad_() for t in make_tables(5, 6))
    x = draw(2, 5, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *args: apply_rotary_emb(*args, interleaved=interleaved), (x, freqs, scale)
    )


def test_nan_and_infinity_pass():
    x, (freqs, _) = draw(5, 8), make_tables(5, 8)
    x[0, 0], x[1, 1], x[2, 2] = math.nan, math.inf, -math.inf
    cos, sin = freqs.cos()[None, :, :4], freqs.sin()[None, :, :4]
    assert_same_bits(
        apply_rotary_emb(x, freqs), rotate_eagerly(x[None, None], cos, sin, None, False)[0, 0]
    )


BAD = {
    "shorter": (
        ((2, 5, 8), (4, 8), 1.0),
        "freqs must have one row for each row of x, got 4 rows of freqs and 5 of x",
    ),
    "longer": (
        ((2, 5, 8), (9, 8), 1.0),
        "freqs must have one row for each row of x, got 9 rows of freqs and 5 of x",
    ),
    "wide": (
        ((2, 5, 8), (5, 10), 1.0),
        "rotary_dim must be even and <= head_dim, got rotary_dim=10, head_dim=8",
    ),
    "odd": (
        ((2, 5, 8), (5, 7), 1.0),
        "rotary_dim must be even and <= head_dim, got rotary_dim=7, head_dim=8",
    ),
    "scale": (
        ((2, 5, 8), (5, 8), torch.ones(9, 8)),
        "scale must be a number or have the shape of freqs, got (9, 8) and (5, 8)",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_apply_refuses_what_does_not_fit(call, message):
    x, freqs, scale = call
    with pytest.raises(RotaryExportError, match=f"^{re.escape(message)}$"):
        apply_rotary_emb(torch.zeros(x), torch.zeros(freqs), scale)
