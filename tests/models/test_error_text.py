"""Errors of torch's exporters: one sentence with the model's own line and a way out."""

import importlib.util
import sys

import pytest
import sympy
import torch
from helpers.tiny_modules import X, rope_of
from torch import nn

from rotary_export import RotaryExportError, export_model
from rotary_export.compat.onnx_translations import find_failing_node
from rotary_export.models.error_text import find_location
from rotary_export.models.trace.condition_text import describe_condition


class Model(nn.Module):
    """A rotation, and what can't be exported."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, ids):
        return self.function(rope_of(x), ids)


def decide(x, ids):
    return x if (ids > 2).any() else x + 1


def repeat(x, ids):
    while ids.max() > 3:
        ids = ids - 1
    return x + ids[..., None]


def leave_torch(x, ids):
    return x * float(ids.numpy().sum())


def count(x, ids):
    return torch.cat([x[:, :n] for n in ids[0].tolist()], 1)


def decompose(x, ids):
    return x * torch.linalg.svd(x)[1].sum()


def collect(x, ids):
    return x * len({x.shape[1]})


def roll(x, ids):
    return x.roll(x.shape[1], 1)


VALUES = r"the model decides, or chooses a size, by the values of its tensors \(at "
REFUSED = {
    decide: VALUES + r"\S+test_error_text\.py:\d+, decide\); choose .* torch.where",
    repeat: VALUES + r"\S+test_error_text\.py:\d+, repeat\); choose",
    leave_torch: VALUES + r"\S+test_error_text\.py:\d+, leave_torch\); choose",
    collect: r"trace the model: a dynamic size is no plain number \(at \S+test_error_text\.py:\d+, "
    r"collect\); change the model there, or give it fixed sizes with dynamic_shapes",
    count: r"specialises seq_len .*test_error_text\.py, line \d+ in count; .* dynamic_shapes",
    decompose: r"torch.onnx can't write the model: it has no translation of aten\._linalg_svd\S+ "
    r"\(at \S+test_error_text\.py:\d+, forward\); use other operators there, or leave 'onnx' out",
    roll: r"it fails at aten\.roll\.default \(at \S+test_error_text\.py:\d+, forward\): TypeError: "
    "Unsupported attribute type",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_what_cant_be_exported_is_one_sentence(tmp_path, function):
    inputs = {"x": X, "ids": torch.arange(6).repeat(2, 1)}
    with pytest.raises(RotaryExportError, match=REFUSED[function]) as caught:
        export_model(Model(function), inputs, tmp_path / "b", formats=["onnx"])
    text = str(caught.value)
    assert "\n" not in text
    assert not any(words in text for words in ("stack trace", "site-packages", "torch/"))


def test_another_opset_is_named_where_it_works(tmp_path, monkeypatch):
    from rotary_export.models import write_onnx

    adapt = write_onnx.adapt_program

    def fail_at_23(program, opset):
        if opset == 23:
            raise TypeError("not here")
        return adapt(program, opset)

    monkeypatch.setattr(write_onnx, "adapt_program", fail_at_23)
    model = Model(lambda x, ids: x + ids[..., None])
    inputs = {"x": X, "ids": torch.arange(6).repeat(2, 1)}
    with pytest.raises(RotaryExportError, match=r"not here.*; it can with opset=22 \(--opset 22\)"):
        export_model(model, inputs, tmp_path / "b", formats=["onnx"])


def test_no_opset_is_named_where_a_second_try_works(tmp_path, monkeypatch):
    """Decompositions may leave sizes constant, with which a graph can be written, wrongly."""
    from rotary_export.models import write_onnx

    adapt, tries = write_onnx.adapt_program, []

    def fail_once(program, opset):
        tries.append(opset)
        if len(tries) == 1:
            raise TypeError("not at first")
        return adapt(program, opset)

    monkeypatch.setattr(write_onnx, "adapt_program", fail_once)
    model = Model(lambda x, ids: x + ids[..., None])
    inputs = {"x": X, "ids": torch.arange(6).repeat(2, 1)}
    with pytest.raises(RotaryExportError, match=r"not at first.*; use other operators there, or"):
        export_model(model, inputs, tmp_path / "b", formats=["onnx"])
    assert tries == [23, 22, 23]


def test_the_line_is_not_one_of_a_library_that_computes_for_the_model():
    trace = "\n".join(
        f'  File "{file}", line {line}, in {name}'
        for file, line, name in (
            ("/e/lib/python3.11/site-packages/shop/model.py", 7, "forward"),
            ("/e/lib/python3.11/site-packages/einx/_src/api.py", 8, "call"),
            ("/e/lib/python3.11/site-packages/einops/einops.py", 9, "rearrange"),
            ("/e/lib/python3.11/site-packages/torch/_ops.py", 10, "__call__"),
            (importlib.util.find_spec("contextlib").origin, 11, "inner"),
            ("<string>", 12, "eval"),
        )
    )
    assert find_location(trace) == " (at shop/model.py:7, forward)"
    assert find_location("no frame") == ""


def test_an_error_without_a_node():
    assert find_failing_node(ValueError("Error when translating node %x : gone")) is None


N, B = sympy.symbols("n b", integer=True, positive=True)
NAMES = {N: "seq_len", B: "batch_size"}
functions = sys.modules["torch.utils._sympy.functions"]
CONDITIONS = {
    "seq_len / 16 == 0.4375": sympy.Eq(functions.IntTrueDiv(N, 16), sympy.Float(0.4375)),
    "seq_len is a multiple of 8": sympy.Eq(functions.Mod(N, 8), 0),
    "seq_len is not a multiple of 8": sympy.Ne(functions.Mod(N, 8), 0),
    "seq_len % 8 == 3": sympy.Eq(functions.Mod(N, 8), 3),
    "seq_len // 3 >= batch_size": sympy.Ge(functions.FloorDiv(N, 3), B),
    "batch_size * seq_len <= 200": N * B <= 200,
    "2 * seq_len < 9": sympy.Lt(2 * N, 9, evaluate=False),
    "max(1, seq_len - 30) == 1": sympy.Eq(functions.Max(1, N - 30), 1),
    "(seq_len - 1) // 4 != 2": sympy.Ne(functions.FloorDiv(N - 1, 4), 2),
    "seq_len - batch_size > 3": sympy.Gt(N - B, 3, evaluate=False),
    "seq_len ** 2 > 3": sympy.Gt(N**2, 3, evaluate=False),
    "seq_len > 3 and batch_size == 2": sympy.And(N > 3, sympy.Eq(B, 2), evaluate=False),
}


@pytest.mark.parametrize("text", CONDITIONS)
def test_a_condition_in_words(text):
    found = describe_condition(CONDITIONS[text], NAMES)
    assert sorted(found.split(" and ")) == sorted(text.split(" and "))
