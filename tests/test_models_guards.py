"""Conditions on sizes: limits, sizes to be proven, refusals."""

from dataclasses import dataclass

import pytest
import sympy
import torch
from test_models_export import X, rope_of
from torch import nn
from torch.utils._sympy.functions import FloorDiv, Mod

from rotary_export import export_model, load, verify
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.models.guards import Detour, find_paths, list_sizes

S = sympy.Symbol("s7", integer=True, positive=True)
T = sympy.Symbol("s8", integer=True, positive=True)
NAMES = {"s7": "seq_len", "s8": "batch_size"}


@dataclass
class Place:
    maybe_user_loc: str | None = None
    framework_loc: str = "<FrameSummary file /x/site-packages/torch/a.py, line 3 in view>"


@dataclass
class Guard:
    expr: object
    sloc: object = None

    def __post_init__(self):
        self.sloc = Place()


def find(*conditions):
    limits, detours = find_paths([Guard(condition) for condition in conditions], NAMES)
    return limits, list_sizes(detours)


PATHS = {
    "always": ([S >= 2], {}, {}),
    "up-to": ([S <= 40], {"seq_len": 40}, {}),
    "up-to-far": ([S <= 5000], {"seq_len": 5000}, {}),
    "the-smaller-limit": ([S <= 40, S < 30], {"seq_len": 29}, {}),
    "but-at-one": ([sympy.Ne(16 * S, 1024)], {}, {"seq_len": [64]}),
    "but-at-any": ([sympy.Ne(S, 37)], {}, {"seq_len": [37]}),
    "but-at-multiples": ([Mod(S, 256) > 0], {}, {"seq_len": [256, 512]}),
    "multiples-in-limits": ([Mod(S, 256) > 0, S <= 300], {"seq_len": 300}, {"seq_len": [256]}),
    "but-in-a-range": ([sympy.Ne(FloorDiv(S, 10), 3)], {}, {"seq_len": [30]}),
    "too-long-to-prove": ([sympy.Ne(FloorDiv(S + 255, 256), 8)], {"seq_len": 1792}, {}),
    "two-sizes": ([sympy.Ne(S, 37), sympy.Ne(T, 2)], {}, {"seq_len": [37], "batch_size": [2]}),
    "of-both": ([sympy.Eq(S * T, 12)], {}, {}),
}


@pytest.mark.parametrize("case", PATHS.values(), ids=PATHS)
def test_paths(case):
    conditions, limits, sizes = case
    assert find(*conditions) == (limits, sizes)


@pytest.mark.parametrize("condition", [sympy.Eq(S, 7), sympy.Eq(Mod(S, 3), 1), S < 2], ids=str)
def test_a_condition_that_rarely_holds_is_refused(condition):
    words = r"another path where not .*seq_len.*, at torch/a\.py, line 3 in view; give seq_len a"
    with pytest.raises(RotaryExportError, match=words):
        find(condition)


def test_a_detour_says_where():
    _, (detour,) = find_paths([Guard(sympy.Ne(S, 37))], NAMES)
    assert detour == Detour("seq_len", (37,), "Ne(seq_len, 37), at torch/a.py, line 3 in view")


class Chunked(nn.Module):
    """Works in chunks of 4, padded, and at multiples of 4 without."""

    def __init__(self, added: float):
        super().__init__()
        self.added = added

    def forward(self, x):
        y = rope_of(x)
        pad = -x.shape[1] % 4
        if pad > 0:
            return nn.functional.pad(y, (0, 0, 0, pad))[:, : x.shape[1]]
        return y + self.added


def test_another_path_of_the_same_values_is_proven(tmp_path):
    bundle = export_model(Chunked(0.0), {"x": X}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.config["detours"] == {"seq_len": [4, 8]}
    shapes = {"batch_size 3, seq_len 4", "batch_size 3, seq_len 8"}
    assert shapes <= set(bundle.report.shapes["model"])
    assert shapes <= set(verify(bundle.path).shapes["model"])
    x = torch.randn(1, 12, 16)
    torch.testing.assert_close(
        torch.as_tensor(load(bundle, "model")(x=x)["output"]), rope_of(x), rtol=0, atol=1e-5
    )


def test_another_path_of_other_values_is_refused_with_its_place(tmp_path):
    words = r"not equal to eager.* another path where not .*test_models_guards\.py, line \d+ in"
    with pytest.raises(CheckFailedError, match=words):
        export_model(Chunked(1.0), {"x": X}, tmp_path / "b", formats=["onnx"])
    assert not list(tmp_path.iterdir())
