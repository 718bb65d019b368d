"""What is replaced in a model of several layers, and how often the functions are called."""

from collections import Counter

import pytest
import torch
from helpers import rotary_styles as styles
from torch import nn

from rotary_export.errors import CheckFailedError
from rotary_export.models.analyze import check_found, find_rotary_calls
from rotary_export.models.find.candidates import find_candidates
from rotary_export.models.find.replace import replace_calls
from rotary_export.models.find.replacement import find_replacement

B, N, S, H = 2, 3, 5, 16
calls = Counter()


def rotate_pair(q, k, cos, sin):
    calls["rotate_pair"] += 1
    return styles.rope_half(q, k, cos, sin)


def rotate_and_scale(q, k, cos, sin):
    """Not a rotation, but makes one."""
    q, k = rotate_pair(q, k, cos, sin)
    return q.tanh(), k


class RotaryTables(nn.Module):
    """Cos and sin in the type of x."""

    @staticmethod
    def rotate_static(x, cos, sin):
        return styles.rope_half(x, x, cos, sin)[0]

    def forward(self, x):
        angle = styles.make_angles(x.shape[-2], H // 2, x.shape[0])
        angle = torch.cat((angle, angle), -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class Model(nn.Module):
    """Tables once, then layers; `function` rotates."""

    def __init__(self, function, layers=2):
        super().__init__()
        self.tables, self.function, self.layers = RotaryTables(), function, layers

    def forward(self, q, k):
        cos, sin = self.tables(q)
        for _ in range(self.layers):
            q, k = self.function(q, k, cos, sin)
        return q, k


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


Q, K = rand(B, N, S, H), rand(B, 1, S, H)


def test_layers_share_their_tables():
    model = Model(rotate_pair_of_module, 3)
    want = model(Q, K)
    found = find_replacement(model, lambda: model(Q, K))
    assert (found.calls, found.fused) == (3, 3)
    calls.clear()
    with replace_calls(found) as counts:
        got = model(Q, K)
    assert sum(counts.values()) == 3
    assert calls["rotate_pair"] == 1  # for the tables, on one head
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


class TwoTables(Model):
    """Layers of two kinds, each with angles of its own."""

    def forward(self, q, k):
        cos, sin = self.tables(q)
        other = torch.cat((styles.make_angles(S, H // 2, B) / 8,) * 2, -1)
        for _ in range(self.layers):
            q, k = rotate_pair_of_module(q, k, cos, sin)
            q, k = rotate_pair_of_module(q, k, other.cos(), other.sin())
        return q, k


def test_layers_of_two_kinds_have_tables_of_their_own():
    model = TwoTables(None, 1)
    want = model(Q, K)
    found = find_replacement(model, lambda: model(Q, K))
    calls.clear()
    with replace_calls(found):
        got = model(Q, K)
    assert calls["rotate_pair"] == 2
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def rotate_pair_of_module(q, k, cos, sin):
    return rotate_pair(q, k, cos, sin)


def test_the_outermost_rotation_is_replaced():
    model = Model(lambda *args: rotate_pair_of_module(*args), 1)
    found = find_replacement(model, lambda: model(Q, K))
    assert [f.function.rpartition(".")[2] for f in found.findings] == ["rotate_pair_of_module"]


def test_a_rotation_inside_another_function_is_replaced():
    model = Model(lambda *args: rotate_and_scale(*args), 2)
    want = model(Q, K)
    found = find_replacement(model, lambda: model(Q, K))
    (finding,) = found.findings
    assert finding.function.endswith("rotate_pair")
    assert (finding.calls, finding.fused) == (2, 2)
    with replace_calls(found):
        torch.testing.assert_close(model(Q, K)[0], want[0], rtol=0, atol=2e-6)


def test_half_models_get_float32_tables():
    model = Model(lambda *args: rotate_pair_of_module(*args), 1)
    q, k = Q.half(), K.half()
    found = find_replacement(model, lambda: model(q, k))
    assert found.table_modules == [model.tables]
    angle = styles.make_angles(S, H // 2, B)
    angle = torch.cat((angle, angle), -1)
    want = styles.rope_half(q.float(), k.float(), angle.cos(), angle.sin())[0]
    with replace_calls(found):
        got = model(q, k)[0]
    assert got.dtype == torch.float16
    rounding = (got.float() - want).abs() / want.abs().clamp(min=2.0**-14)
    assert rounding.max() <= 2.0**-11  # rounded once; half tables would round more
    assert ((model(q, k)[0].float() - want).abs() / want.abs()).max() > 2.0**-11


class Elsewhere(Model):
    """Uses its tables for something else, too."""

    def forward(self, q, k):
        cos, sin = self.tables(q)
        q, k = rotate_pair_of_module(q, k, cos, sin)
        return rotate_nothing(q, cos), k


def rotate_nothing(q, cos):
    return q.tanh() + cos.sum()


def test_tables_that_others_read_keep_their_type():
    model = Elsewhere(None)
    found = find_replacement(model, lambda: model(Q.half(), K.half()))
    assert found.fused == 1
    assert found.table_modules == []


class Static(nn.Module):
    """Calls a static method of a class by its instance."""

    def __init__(self):
        super().__init__()
        self.tables = RotaryTables()

    def forward(self, q):
        return self.tables.rotate_static(q, *self.tables(q))


def test_static_methods_are_replaced_and_restored():
    model = Static()
    want, original = model(Q), RotaryTables.rotate_static.__code__
    found = find_replacement(model, lambda: model(Q))
    assert found.fused == 1
    with replace_calls(found) as counts:
        got = model(Q)
        assert RotaryTables.rotate_static.__code__ is not original
    assert list(counts.values()) == [1]
    assert RotaryTables.rotate_static.__code__ is original
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_forward_of_a_rotary_class_is_a_candidate_and_init_is_not():
    names = {c.name.rpartition("RotaryTables.")[2] for c in find_candidates(Static())}
    assert {"forward", "rotate_static"} <= names
    assert "__init__" not in names


def test_find_rotary_calls_restores_the_model():
    model = Model(rotate_pair_of_module, 1).train()
    found = find_rotary_calls(model, {"q": Q, "k": K})
    assert (found.calls, found.fused) == (1, 1)
    assert model.training
    assert model(Q, K)[0].shape == Q.shape


def test_no_call_that_can_be_replaced_is_an_error():
    model = Model(lambda q, k, cos, sin: (q, k), 1)
    found = find_rotary_calls(model, {"q": Q, "k": K})
    with pytest.raises(CheckFailedError, match="Model applies no rotary embedding"):
        check_found(model, found, ["program"])
    model = Model(lambda *args: rotate_wrongly(*args), 1)
    found = find_rotary_calls(model, {"q": Q, "k": K})
    message = r"none of the 1 rotary calls of Model can be replaced: .*rotate_wrongly: in no layout"
    with pytest.raises(CheckFailedError, match=message):
        check_found(model, found, ["program"])


def rotate_wrongly(q, k, cos, sin):
    return styles.rope_half(q, q, cos, sin)[0] * (torch.arange(H) % 3 > 0), k


def rotate_along(q, k, cos, sin, dim=1, length=0):
    """The heads are dimension `dim`; `length` is a size."""
    half, cos, sin = H // 2, cos.unsqueeze(dim), sin.unsqueeze(dim)
    turned = [torch.cat((-x[..., half:], x[..., :half]), -1) for x in (q, k)]
    return q * cos + turned[0] * sin, k * cos + turned[1] * sin


class BothLayouts(nn.Module):
    """One function for (B, N, S, H) and for (B, S, N, H), told apart by an integer."""

    def __init__(self):
        super().__init__()
        self.tables = RotaryTables()

    def forward(self, q, k):
        cos, sin = self.tables(q)
        length = q.shape[-2]
        q, k = rotate_along(q, k, cos, sin, length=length)
        q, k = (x.transpose(1, 2) for x in (q, k))
        return rotate_along(q, k, cos, sin, dim=2, length=length)


def test_an_integer_that_names_a_dimension_tells_calls_apart():
    model = BothLayouts()
    found = find_replacement(model, lambda: model(Q, K))
    assert (found.calls, found.fused) == (2, 2)
    assert sorted(finding.rotation[-4:] for finding in found.findings) == ["BNSH", "BSNH"]
    with replace_calls(found):
        got = model(Q, K)
    for ours, theirs in zip(got, model(Q, K), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_an_integer_that_is_a_size_may_differ():
    model = Model(lambda q, k, cos, sin: rotate_along(q, k, cos, sin, length=q.shape[-2]))
    found = find_replacement(model, lambda: model(Q, K))
    assert (found.calls, found.fused) == (2, 2)
    with replace_calls(found) as counts:
        model(rand(B, N, S + 4, H), rand(B, 1, S + 4, H))
    assert sum(counts.values()) == 2
