"""Composite operators are written as ONNX without a decomposition of the whole program."""

import pytest
import torch
from helpers.tiny_models import make_model
from helpers.traced_onnx import Function, run, trace, write

from rotary_export import export_model
from rotary_export.models.trace.adapt.adapt_program import adapt_program

CASES = {
    "conversion": lambda x, y: (x * 3).to(torch.int64) + y.to(torch.int64),
    "same-type": lambda x, y: x.to(torch.float32) + y,
    "to-a-device": lambda x, y: (x > 0).to("cpu", torch.float64) * y.to("cpu"),
    "like-another": lambda x, y: (x > 0).to(y) * y,
    "detach": lambda x, y: x.detach() * torch.tensor(3.0).detach_() + y,
    "logic": lambda x, y: ((x > 0) & (y > 0)) | (x > y),
    "bits": lambda x, y: (x * 9).to(torch.int64) & 6 | (y * 5).to(torch.int32),
    "unused": lambda x, y: (x + y, x.sin().exp())[0],
}


@pytest.fixture
def decomposed(monkeypatch):
    """The programs that are decomposed."""
    programs = []
    own = torch.export.ExportedProgram.run_decompositions

    def run_decompositions(program, *arguments):
        programs.append(program)
        return own(program, *arguments)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", run_decompositions)
    return programs


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case, decomposed):
    dims = [("b", "s"), ("b", "s")]
    program = trace(Function(CASES[case]), [torch.randn(2, 5), torch.randn(2, 5)], dims)
    before = str(program.graph)
    adapted = adapt_program(program, 20)
    assert str(program.graph) == before
    assert not any("assert" in str(n.target) or "sin" in str(n.target) for n in adapted.graph.nodes)
    assert all("val" in node.meta for node in adapted.graph.nodes if node.op == "call_function")
    x, y = torch.randn(2, 3, 7)
    (got,) = run(write(adapted, 20), [x, y])
    want = CASES[case](x, y)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def test_a_model_is_traced_once(decomposed, tmp_path):
    inputs = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6).long()}
    model = make_model("llama", num_hidden_layers=1)
    export_model(model, inputs, tmp_path / "b", formats=["onnx"])
    assert decomposed == []
