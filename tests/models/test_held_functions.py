"""Rotary functions are found and replaced wherever a model holds them."""

import functools
import importlib
import sys
import warnings

import pytest
import torch
from helpers import rotary_styles as styles
from torch import nn

from rotary_export import register_rotary
from rotary_export.compat.script import get_source
from rotary_export.models.find.candidates import find_candidates
from rotary_export.models.find.names import is_rotary_name
from rotary_export.models.find.redirect import Place, redirect_calls
from rotary_export.models.find.replace import replace_calls
from rotary_export.models.find.replacement import find_replacement

B, N, S, H = 2, 3, 5, 16
GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(B, N, S, H, generator=GENERATOR)
ANGLE = torch.cat((styles.make_angles(S, H // 2, B),) * 2, -1)
COS, SIN = ANGLE.cos(), ANGLE.sin()


def script(function):
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return torch.jit.script(function)


def apply_rope(x, cos, sin):
    return styles.rope_half(x, x, cos, sin)[0]


@script
def apply_rope_scripted(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


@script
def spin_scripted(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    apply_rope_traced = torch.jit.trace(apply_rope, (X, COS, SIN))


@functools.lru_cache(maxsize=4)
def apply_rope_cached(x, cos, sin):
    return styles.rope_half(x, x, cos, sin)[0]


def without_gradients(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with torch.no_grad():
            return function(*args, **kwargs)

    return wrapper


@without_gradients
def apply_rope_decorated(x, cos, sin):
    return styles.rope_half(x, x, cos, sin)[0]


def rotate_wide(scale, x, *, cos, sin):
    return styles.rope_half(x, x, scale * cos, scale * sin)[0]


class Calls(nn.Module):
    """Calls a function of a module."""

    def __init__(self, function):
        super().__init__()
        self.rotate = function

    def forward(self, x, cos, sin):
        return self.rotate(x, cos, sin)


class CallsOther(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.spin = function

    def forward(self, x, cos, sin):
        return self.spin(x, cos, sin)


class CallsScripted(nn.Module):
    def forward(self, x, cos, sin):
        return apply_rope_scripted(x, cos, sin)


class Nested(nn.Module):
    """Defines the function where it is called."""

    def forward(self, x, cos, sin):
        def apply_rotary(x, cos, sin):
            return styles.rope_half(x, x, cos, sin)[0]

        return apply_rotary(x, cos, sin)


class Captures(nn.Module):
    """The function reads the tables from outside, and so does one in it; two kinds of angles."""

    def forward(self, x, cos, sin):
        def apply_rotary(x, scale=1.0):
            def rotate_half(x):
                return styles.half_turn(x) * sin[:, None]

            return (x * cos[:, None] + rotate_half(x)) * scale

        x = apply_rotary(x)
        cos, sin = sin, cos
        return apply_rotary(x)


class CapturesNumber(nn.Module):
    """The function reads a number from outside."""

    def forward(self, x, cos, sin):
        scale = 1.0

        def apply_rotary(x, cos, sin):
            return styles.rope_half(x, x, cos, sin)[0] * scale

        x = apply_rotary(x, cos, sin)
        scale = 2.0
        return apply_rotary(x, cos, sin)


class CapturesAll(nn.Module):
    """The function has no arguments."""

    def forward(self, x, cos, sin):
        def apply_rotary():
            return styles.rope_half(x, x, cos, sin)[0]

        return apply_rotary()


class DecoratedForward(nn.Module):
    @without_gradients
    def forward(self, x, cos, sin):
        rotate_all = [None]

        def rotate(x, *tables, name=None, **other):
            assert name == "query"
            assert other == {"more": 1}
            return styles.rope_half(x, x, *tables)[0]

        rotate_all[0] = rotate
        return rotate_all[0](x, cos, sin, name="query", more=1)


class RotaryProcessor:
    """No nn.Module; the name of its class counts for `__call__`."""

    def __call__(self, attention, x, cos, sin):
        return styles.rope_half(x, x, cos, sin)[0]


class Processor:
    """No nn.Module either."""

    def __call__(self, attention, x, cos, sin):
        def apply_rotary_emb(x, cos, sin):
            return styles.rope_half(x, x, cos, sin)[0]

        return apply_rotary_emb(x, cos, sin)


class Processed(nn.Module):
    def __init__(self, processor):
        super().__init__()
        self.options = {"processors": 1, "processor": processor}

    def forward(self, x, cos, sin):
        return self.options["processor"](self, x, cos, sin)


class ApplyRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return styles.rope_half(x, x, cos, sin)[0]


class CallsAutograd(nn.Module):
    def forward(self, x, cos, sin):
        return ApplyRotary.apply(x, cos, sin)


MODELS = {
    "function in an attribute": Calls(apply_rope),
    "scripted": CallsScripted(),
    "scripted, in an attribute": Calls(apply_rope_scripted),
    "in an attribute of another name": CallsOther(apply_rope_scripted),
    "traced": Calls(apply_rope_traced),
    "cached": Calls(apply_rope_cached),
    "decorated": Calls(apply_rope_decorated),
    "partial": Calls(lambda x, cos, sin: Calls.partial(x, cos=cos, sin=sin)),
    "nested": Nested(),
    "nested, reads outer variables": Captures(),
    "nested, reads an outer number": CapturesNumber(),
    "nested, without arguments": CapturesAll(),
    "nested, in a decorated method": DecoratedForward(),
    "of autograd": CallsAutograd(),
    "method of a processor": Processed(RotaryProcessor()),
    "nested, in a processor": Processed(Processor()),
}
Calls.partial = functools.partial(rotate_wide, 1.0)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_is_replaced_wherever_it_is_held(model):
    want = model(X, COS, SIN)
    apply_rope_cached.cache_clear()
    found = find_replacement(model, lambda: model(X, COS, SIN))
    assert found.calls == found.fused == (2 if isinstance(model, (Captures, CapturesNumber)) else 1)
    y, angle = torch.randn(3, N, 9, H), torch.cat((styles.make_angles(9, H // 2, 3),) * 2, -1)
    again = model(y, angle.cos(), angle.sin())
    apply_rope_cached.cache_clear()
    with replace_calls(found) as counts:
        for x, cos, sin, result in ((X, COS, SIN, want), (y, angle.cos(), angle.sin(), again)):
            torch.testing.assert_close(model(x, cos, sin), result, rtol=0, atol=2e-6)
    assert sum(counts.values()) == 2 * found.fused
    with replace_calls(found, check=True):
        torch.testing.assert_close(model(X, COS, SIN), want, rtol=0, atol=0)
    with replace_calls(found):
        pass
    assert torch.equal(model(X, COS, SIN), want)


def test_the_name_of_a_nested_function_says_where_it_is():
    model = Processed(Processor())
    (finding,) = find_replacement(model, lambda: model(X, COS, SIN)).findings
    assert finding.function == f"{__name__}.Processor.__call__.<locals>.apply_rotary_emb"
    model = CallsScripted()
    (finding,) = find_replacement(model, lambda: model(X, COS, SIN)).findings
    assert finding.function == f"{__name__}.apply_rope_scripted"


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr("rotary_export.models.find.candidates._registered", found := [])
    return found


@pytest.mark.parametrize(
    "function", [spin_scripted, get_source(spin_scripted)], ids=["it", "its source"]
)
def test_a_scripted_function_of_another_name_is_registered(registered, function):
    class Spins(nn.Module):
        def forward(self, x, cos, sin):
            return spin_scripted(x, cos, sin)

    model = Spins()
    assert find_replacement(model, lambda: model(X, COS, SIN)).findings == []
    assert register_rotary(function) is function
    found = find_replacement(model, lambda: model(X, COS, SIN))
    assert (found.calls, found.fused) == (1, 1)


def test_a_nested_function_of_another_name_is_registered(registered):
    class Spins(nn.Module):
        def forward(self, x, cos, sin):
            @register_rotary
            def spin(x):
                return styles.rope_half(x, x, cos, sin)[0]

            return spin(x)

    model = Spins()
    model(X, COS, SIN)
    found = find_replacement(model, lambda: model(X, COS, SIN))
    with replace_calls(found) as counts:
        model(X, COS, SIN)
    assert (found.calls, found.fused, sum(counts.values()), len(registered)) == (1, 1, 1, 1)


def test_functions_come_back_after_an_error():
    code, call = apply_rope.__code__, torch.jit.ScriptFunction.__call__

    def fail(own, args, kwargs):
        raise RuntimeError("stop")

    places = [Place(apply_rope, code), Place(apply_rope_scripted, None)]
    for function in (apply_rope, apply_rope_scripted):
        with (
            pytest.raises(RuntimeError, match="stop"),
            redirect_calls([(place, fail) for place in places]),
        ):
            function(X, COS, SIN)
    assert apply_rope.__code__ is code
    assert torch.jit.ScriptFunction.__call__ is call
    assert torch.equal(apply_rope(X, COS, SIN), apply_rope_scripted(X, COS, SIN))


PACKAGE = {
    "__init__": "",
    "turns": """
import torch
def apply_rotary(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
""",
    "compiled": """
import torch
@torch.jit.script
def apply_rotary_scripted(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
""",
    "others": "from helpers.rotary_styles import rope_pairs as rotate_elsewhere",
    "model": """
import torch
class Late(torch.nn.Module):
    def forward(self, x, cos, sin):
        from late_imports.compiled import apply_rotary_scripted
        from late_imports.turns import apply_rotary
        return apply_rotary_scripted(apply_rotary(x, cos, sin), cos, sin)
""",
}


def test_what_is_imported_where_it_is_called(tmp_path, monkeypatch):
    folder = tmp_path / "late_imports"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        for name in PACKAGE:
            importlib.import_module(f"late_imports.{name}")
    model = sys.modules["late_imports.model"].Late()
    found = find_replacement(model, lambda: model(X, COS, SIN))
    assert (found.calls, found.fused) == (2, 2)
    names = {candidate.name for candidate in find_candidates(model)}
    assert names == {
        "late_imports.turns.apply_rotary",
        "late_imports.compiled.apply_rotary_scripted",
    }
    for name in list(sys.modules):
        if name.startswith("late_imports"):
            del sys.modules[name]


class Keeps(nn.Module):
    """Keeps a function that it defines in its first run."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, x, cos, sin):
        def apply_rotary(x):
            return styles.rope_half(x, x, cos, sin)[0]

        self.kept.append(apply_rotary)
        return self.kept[0](x)


def test_a_function_that_is_kept_is_itself_again():
    model = Keeps()
    want = styles.rope_half(X, X, COS, SIN)[0]
    found = find_replacement(model, lambda: model(X, COS, SIN))
    assert found.fused == 1
    with replace_calls(found) as counts:
        model.kept.clear()
        model(X, COS, SIN)
    assert torch.equal(model(X, COS, SIN), want)
    assert sum(counts.values()) == 1


@pytest.mark.parametrize(
    "name", ["apply_rot_embed_cat", "rot", "RotEmb", "applyRot", "rot2d", "apply_rope", "Rotary"]
)
def test_names_that_are_looked_at(name):
    assert is_rotary_name(name)


@pytest.mark.parametrize("name", ["protein", "property", "Protocol", "rotten", "quorot", "prot_x"])
def test_names_that_are_not_looked_at(name):
    assert not is_rotary_name(name)
