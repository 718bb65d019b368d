"""Operators on bools that ONNX Runtime's CPU does not run, as ONNX."""

import pytest
import torch
from helpers.traced_onnx import Function, count, run, trace, write

from rotary_export.models.trace.adapt.adapt_program import adapt_program

CASES = {
    "fill-false": lambda a, b: a.masked_fill(b, False),
    "fill-true": lambda a, b: a.masked_fill(b[:1], True),
    "fill-tensor": lambda a, b: a.masked_fill(b, a.any()),
    "choice": lambda a, b: torch.where(a, b, a[:, :1]),
    "einsum-of-both": lambda a, b: torch.einsum("bs,bt->bst", a, b.float() * 2.0),
    "einsum": lambda a, b: torch.einsum("bs,bt->bst", a, b),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("opset", [18, 23])
def test_bools_are_logic_or_numbers(case, opset):
    def function(x, y):
        return CASES[case](x > 0.0, y > 0.0)

    dims = [("b", "s"), ("b", "s")]
    program = trace(Function(function), [torch.randn(2, 5), torch.randn(2, 5)], dims)
    model = write(adapt_program(program, opset), opset)
    x, y = torch.randn(2, 3, 7)
    (got,) = run(model, [x, y])
    assert torch.equal(got, function(x, y))
    assert count(model, "Where") == 0
