"""Probing: what a function computes is found, or it is not replaced."""

from __future__ import annotations

import pytest
import torch
from helpers import rotary_styles as styles
from torch import nn
from torch.utils import _pytree as pytree

from rotary_export import RotaryExportError, register_rotary
from rotary_export.errors import CheckFailedError
from rotary_export.models.find.calls import RecordedCall
from rotary_export.models.find.candidates import Candidate, find_candidates
from rotary_export.models.find.probe import NotReplacedError, find_lowering
from rotary_export.models.find.redirect import OwnFunction, Place
from rotary_export.models.find.replace import replace_calls
from rotary_export.models.find.replacement import find_replacement

B, N, S, H = 2, 3, 5, 16


def record(function, *args):
    leaves, tree = pytree.tree_flatten((args, {}, {}))
    output, output_tree = pytree.tree_flatten(function(*args))
    return RecordedCall(
        Candidate("it", Place(function, None)),
        OwnFunction(function, function, {}),
        leaves,
        tree,
        output,
        output_tree,
    )


def tile(table):
    return torch.cat((table, table), dim=-1)


def repeat(table):
    return table.repeat_interleave(2, dim=-1)


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


Q, K = rand(B, N, S, H), rand(B, 1, S, H)
ANGLE = styles.make_angles(S, H // 2, B)
COS, SIN = ANGLE.cos(), ANGLE.sin()
SMALL = styles.make_angles(S, 2, B)
ZETA = 0.9 ** (torch.arange(S)[:, None] - 2.0) * torch.linspace(0.5, 1, H // 2)

# name: function, arguments, layout, start, rotary_dim, axes, joined
CASES = {
    "half": (styles.rope_half, (Q, K, tile(COS), tile(SIN)), "half", 0, H, "BNSH", True),
    "pairs": (styles.rope_pairs, (Q, K, COS, SIN), "interleaved", 0, H, "BNSH", True),
    "leading": (
        styles.rope_leading,
        (Q, tile(SMALL.cos()), tile(SMALL.sin())),
        "half",
        0,
        4,
        "BNSH",
        False,
    ),
    "trailing": (
        styles.rope_trailing,
        (Q, repeat(SMALL.cos()), repeat(SMALL.sin())),
        "interleaved",
        H - 4,
        4,
        "BNSH",
        False,
    ),
    "middle": (styles.rope_middle, (SMALL, Q), "interleaved", 2, 4, "BNSH", False),
    "complex": (
        styles.rope_complex,
        (Q.transpose(1, 2), torch.polar(torch.ones_like(ANGLE), ANGLE)),
        "interleaved",
        0,
        H,
        "BSNH",
        False,
    ),
    "deinterleave": (
        styles.rope_deinterleave,
        (Q, K, COS, SIN),
        "deinterleaved",
        0,
        H,
        "BNSH",
        True,
    ),
    "packed": (
        styles.rope_packed,
        (torch.cat((SIN, COS), -1), Q),
        "interleaved",
        0,
        H,
        "BNSH",
        False,
    ),
    "xpos": (styles.rope_scaled, (Q, tile(ANGLE), tile(ZETA)), "half", 0, H, "BNSH", False),
    "xpos-of-both": (
        styles.rope_both_scaled,
        (Q, K, tile(COS), tile(SIN), tile(ZETA)),
        "half",
        0,
        H,
        "BNSH",
        False,
    ),
    "factor": (
        styles.rope_half,
        (Q, K, tile(1.3 * COS), tile(1.3 * SIN)),
        "half",
        0,
        H,
        "BNSH",
        True,
    ),
    "value-too": (styles.rope_three, (Q, K, Q + 1, tile(COS), tile(SIN)), "half", 0, H, "BNSH", 0),
    "key-as-it-was": (styles.rope_maybe, (Q, K, tile(COS), tile(SIN)), "half", 0, H, "BNSH", 0),
    "vision": (
        styles.rope_vision,
        (Q[0].transpose(0, 1), Q[1].transpose(0, 1), tile(COS), tile(SIN)),
        "half",
        0,
        H,
        "SNH",
        True,
    ),
    "one-head": (styles.rope_pairs, (K, K + 1, COS, SIN), "interleaved", 0, H, "BNSH", True),
}


# They concatenate x's own channels with rotated ones, whose batch is that of the tables.
CONCATENATING = (styles.rope_leading, styles.rope_trailing, styles.rope_middle)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_finds_the_lowering(case):
    function, args, layout, start, rotary_dim, axes, joined = case
    found = find_lowering(record(function, *args))
    assert (found.polar is not None) == (function is styles.rope_complex)
    assert found.whole_batch == (function in CONCATENATING)
    got = (found.layout, found.start, found.rotary_dim, found.axes, found.joined)
    assert got == (layout, start, rotary_dim, axes, bool(joined))


def change(table, index, value):
    """Return a copy of a table (B, S, R/2) with one channel replaced."""
    changed = table.clone()
    changed[..., index] = value
    return changed


def make_near_misses():
    """Tables for the second members of the pairs; those of the first members are COS and SIN."""
    position = torch.arange(S) + 3 * torch.arange(B)[:, None]
    off = position[..., None] * (0.3 * (1 + 1e-4)) ** torch.arange(H // 2)
    return {
        "cosines in half precision": (COS.half().float(), SIN),
        "sines in bfloat16": (COS, SIN.bfloat16().float()),
        "base off by 1e-4": (off.cos(), off.sin()),
        "another pair's sine": (COS, change(SIN, 3, SIN[..., 4])),
        "sine of half the angle in one pair": (COS, change(SIN, 5, (ANGLE[..., 5] / 2).sin())),
        "one sine of the other sign": (COS, change(SIN, 2, -SIN[..., 2])),
        "the next position": (COS.roll(-1, 1), SIN.roll(-1, 1)),
        "scale 1.0001 of cosines": (1.0001 * COS, SIN),
        "scale 1.00001 of sines": (COS, 1.00001 * SIN),
    }


NEAR_MISSES = {
    name: (styles.rope_uneven, (Q, COS, SIN, *tables))
    for name, tables in make_near_misses().items()
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_a_near_miss_is_not_replaced(case):
    function, args = case
    with pytest.raises(NotReplacedError, match="in no layout does the op equal it"):
        find_lowering(record(function, *args))


def test_the_same_tables_twice_are_no_near_miss():
    found = find_lowering(record(styles.rope_uneven, Q, COS, SIN, COS, SIN))
    assert (found.layout, found.rotary_dim) == ("half", H)


NEARLY_LINEAR = {
    "square": lambda q, k, cos, sin: styles.rope_half(q, q, cos, sin)[0] + 1e-5 * q * q,
    "key in query": lambda q, k, cos, sin: (
        styles.rope_half(q, q, cos, sin)[0] + 1e-5 * k,
        styles.rope_half(k, k, cos, sin)[0],
    ),
}


@pytest.mark.parametrize("function", NEARLY_LINEAR.values(), ids=NEARLY_LINEAR.keys())
def test_what_is_nearly_linear_is_not_a_rotation(function):
    assert find_lowering(record(function, Q, Q + 1, tile(COS), tile(SIN))) is None


NOT_REPLACED = {
    "angles of a pair differ": (styles.rope_mixed, (Q, tile(COS), tile(SIN))),
    "two axes": (styles.rope_blocks, (Q, COS.repeat(1, 1, 2), SIN.repeat(1, 1, 2))),
    "masked": (styles.rope_masked, (Q, tile(COS), tile(SIN))),
}


@pytest.mark.parametrize("case", NOT_REPLACED.values(), ids=NOT_REPLACED.keys())
def test_what_the_op_does_not_compute_is_not_replaced(case):
    function, args = case
    with pytest.raises(NotReplacedError, match="in no layout does the op equal it"):
        find_lowering(record(function, *args))


NO_ROTATION = {
    "not linear": (styles.rope_norm, (Q, tile(COS), tile(SIN))),
    "by 90 degrees at every position": (styles.half_turn, (Q,)),
    "no result of its shape": (lambda x: x.sum(-1), (Q,)),
    "no result that depends on it": (lambda x, cos: cos.clone(), (Q, Q + 1)),
}


@pytest.mark.parametrize("case", NO_ROTATION.values(), ids=NO_ROTATION.keys())
def test_no_rotary_embedding(case):
    function, args = case
    assert find_lowering(record(function, *args)) is None


class Attention(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.style = style

    def forward(self, query, key):
        cos, sin = COS, SIN
        if self.style == "mixed":
            return styles_mixed(query, tile(cos), tile(sin)), key
        return turn_by_position(query, key, cos, sin)


def styles_mixed(x, cos, sin):
    return styles.rope_mixed(x, cos, sin)


def turn_by_position(q, k, cos, sin):
    return styles.rope_pairs(q, k, cos, sin)


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(Attention(style) for style in layers)

    def forward(self, query, key):
        for layer in self.layers:
            query, key = layer(query, key)
        return query, key


def test_a_function_of_another_name_must_be_registered(monkeypatch):
    model = Model("pairs", "pairs")
    found = find_replacement(model, lambda: model(Q, K))
    assert found.findings == []

    monkeypatch.setattr("rotary_export.models.find.candidates._registered", [])
    assert register_rotary(turn_by_position) is turn_by_position
    found = find_replacement(model, lambda: model(Q, K))
    assert (found.calls, found.fused) == (2, 2)
    (finding,) = found.findings
    assert finding.function == f"{__name__}.turn_by_position"
    assert finding.rotation == "interleaved, channels 0 to 16, BNSH"


def test_register_rotary_requires_functions():
    with pytest.raises(
        RotaryExportError, match="requires a function or a method of a class, got 3"
    ):
        register_rotary(3)


def test_replaces_equally_and_restores(monkeypatch):
    monkeypatch.setattr("rotary_export.models.find.candidates._registered", [])
    register_rotary(turn_by_position)
    model = Model("pairs", "pairs")
    want = model(Q, K)
    found = find_replacement(model, lambda: model(Q, K))
    original = turn_by_position.__code__

    def run_and_fail():
        with replace_calls(found) as counts:
            got.extend(model(Q, K))
            assert dict(counts) == {f"{__name__}.turn_by_position": 2}
            assert turn_by_position.__code__ is not original
            raise RuntimeError("stop")

    got = []
    with pytest.raises(RuntimeError, match="stop"):
        run_and_fail()
    assert turn_by_position.__code__ is original
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_reason_why_a_call_is_not_replaced(monkeypatch):
    monkeypatch.setattr("rotary_export.models.find.candidates._registered", [])
    register_rotary(styles_mixed)
    model = Model("mixed")
    found = find_replacement(model, lambda: model(Q, K))
    (finding,) = found.findings
    assert (finding.calls, finding.fused) == (1, 0)
    assert finding.reason == "in no layout does the op equal it on random inputs"


def test_candidates_are_found_by_name():
    names = {candidate.name for candidate in find_candidates(Model("pairs"))}
    assert f"{__name__}.turn_by_position" not in names
    assert f"{__name__}.register_rotary" not in names


def test_every_call_is_compared_at_other_sizes(monkeypatch):
    monkeypatch.setattr("rotary_export.models.find.candidates._registered", [])
    register_rotary(turn_at_first)
    model = Turns()
    found = find_replacement(model, lambda: model(Q, COS, SIN))
    assert found.fused == 1
    with replace_calls(found, check=True):
        assert torch.equal(model(Q, COS, SIN), styles.rope_pairs(Q, Q, COS, SIN)[0])
        angle = styles.make_angles(9, H // 2, 2)
        with pytest.raises(CheckFailedError, match=r"turn_at_first by .* of shape \(2, 3, 9, 16\)"):
            model(rand(2, 3, 9, H), angle.cos(), angle.sin())


def turn_at_first(x, cos, sin):
    """Rotate all but what is past row 7, and scale that."""
    rows = torch.arange(x.shape[-2])[:, None]
    return torch.where(rows < 7, styles.rope_pairs(x, x, cos, sin)[0], x * x)


class Turns(nn.Module):
    def forward(self, x, cos, sin):
        return turn_at_first(x, cos, sin)
