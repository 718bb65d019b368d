"""Probing: what a function computes is found out, or it is left alone."""

from __future__ import annotations

import pytest
import torch
from helpers import rotary_styles as styles
from torch import nn
from torch.utils import _pytree as pytree

from rotary_export import RotaryExportError, register_rotary
from rotary_export.errors import CheckFailedError
from rotary_export.models.find.calls import Call, Target, find_targets
from rotary_export.models.find.probe import NotReplacedError, find_rotation
from rotary_export.models.find.replace import find_replacement, replace_calls

B, N, S, H = 2, 3, 5, 16


def record(function, *args):
    leaves, tree = pytree.tree_flatten((args, {}))
    output, output_tree = pytree.tree_flatten(function(*args))
    return Call(Target("it", function, ()), leaves, tree, output, output_tree)


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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_finds_the_rotation(case):
    function, args, layout, start, rotary_dim, axes, joined = case
    rotation = find_rotation(record(function, *args))
    assert (rotation.polar is not None) == (function is styles.rope_complex)
    got = (rotation.layout, rotation.start, rotation.rotary_dim, rotation.axes, rotation.joined)
    assert got == (layout, start, rotary_dim, axes, bool(joined))


LEFT_ALONE = {
    "angles of a pair differ": (styles.rope_mixed, (Q, tile(COS), tile(SIN))),
    "two axes": (styles.rope_blocks, (Q, COS.repeat(1, 1, 2), SIN.repeat(1, 1, 2))),
    "masked": (styles.rope_masked, (Q, tile(COS), tile(SIN))),
}


@pytest.mark.parametrize("case", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_leaves_alone_what_the_op_does_not_compute(case):
    function, args = case
    with pytest.raises(NotReplacedError, match="no layout of the op gives what it gives"):
        find_rotation(record(function, *args))


NO_ROTATION = {
    "not linear": (styles.rope_norm, (Q, tile(COS), tile(SIN))),
    "by 90 degrees at every position": (styles.half_turn, (Q,)),
    "no result of its shape": (lambda x: x.sum(-1), (Q,)),
    "no result that depends on it": (lambda x, cos: cos.clone(), (Q, Q + 1)),
}


@pytest.mark.parametrize("case", NO_ROTATION.values(), ids=NO_ROTATION.keys())
def test_no_rotary_embedding(case):
    function, args = case
    assert find_rotation(record(function, *args)) is None


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


def test_a_name_that_says_nothing_has_to_be_registered(monkeypatch):
    model = Model("pairs", "pairs")
    found = find_replacement(model, lambda: model(Q, K))
    assert [f.function for f in found.findings] == ["rotary_styles.rope_pairs"] * 0

    monkeypatch.setattr("rotary_export.models.find.calls._registered", [])
    assert register_rotary(turn_by_position) is turn_by_position
    found = find_replacement(model, lambda: model(Q, K))
    assert (found.calls, found.fused) == (2, 2)
    (finding,) = found.findings
    assert finding.function == "test_models_probe.turn_by_position"
    assert finding.what == "interleaved, channels 0 to 16, BNSH"


def test_register_rotary_takes_functions():
    with pytest.raises(RotaryExportError, match="takes a function or a method of a class, got 3"):
        register_rotary(3)


def test_replaces_gives_the_same_and_puts_back(monkeypatch):
    monkeypatch.setattr("rotary_export.models.find.calls._registered", [])
    register_rotary(turn_by_position)
    model = Model("pairs", "pairs")
    want = model(Q, K)
    found = find_replacement(model, lambda: model(Q, K))
    original = turn_by_position

    def run_and_fail():
        with replace_calls(found) as counts:
            got.extend(model(Q, K))
            assert dict(counts) == {"test_models_probe.turn_by_position": 2}
            assert turn_by_position is not original
            raise RuntimeError("stop")

    got = []
    with pytest.raises(RuntimeError, match="stop"):
        run_and_fail()
    assert turn_by_position is original
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_says_why_a_call_is_left(monkeypatch):
    monkeypatch.setattr("rotary_export.models.find.calls._registered", [])
    register_rotary(styles_mixed)
    model = Model("mixed")
    found = find_replacement(model, lambda: model(Q, K))
    (finding,) = found.findings
    assert (finding.calls, finding.fused) == (1, 0)
    assert finding.reason == "no layout of the op gives what it gives on random inputs"


def test_targets_are_found_by_name():
    names = {target.name for target in find_targets(Model("pairs"))}
    assert "test_models_probe.turn_by_position" not in names
    assert "test_models_probe.register_rotary" not in names


def test_every_call_is_compared_at_other_sizes(monkeypatch):
    monkeypatch.setattr("rotary_export.models.find.calls._registered", [])
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
