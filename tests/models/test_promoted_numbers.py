"""Integer tensors and numbers that are made of sizes: torch.onnx promotes neither by itself."""

import pytest
import torch
from helpers.traced_onnx import Function, run, trace, write

from rotary_export.models.trace.adapt.adapt_program import adapt_program


def rows(x):
    return torch.arange(x.shape[1])


CASES = {
    "multiply": lambda x: x + rows(x) * (16 / x.shape[1]),
    "multiply-first": lambda x: x + (x.shape[1] / 3) * rows(x),
    "add": lambda x: x + (rows(x) + x.shape[1] / 3),
    "subtract": lambda x: x + (rows(x) - (x.shape[1] - 1) / 2),
    "subtract-from": lambda x: x + (x.shape[1] / 2 - rows(x)),
    "subtract-from-a-number": lambda x: x + (1.5 - rows(x)),
    "subtract-from-a-size": lambda x: x + (x.shape[1] - rows(x)),
    "divide": lambda x: x + rows(x) / (x.shape[1] / 3),
    "clamp": lambda x: x + rows(x).clamp(max=x.shape[1] / 2),
    "compare": lambda x: x * (rows(x) > x.shape[1] / 3),
    "float": lambda x: x * (x.shape[1] / 3),
}


@pytest.mark.parametrize("name", CASES)
def test_is_computed_as_a_float(name):
    program = trace(Function(CASES[name]), [torch.randn(2, 7)], [("b", "s")])
    x = torch.randn(3, 10)
    got = run(write(adapt_program(program, 23)), [x])[0]
    torch.testing.assert_close(got, CASES[name](x), rtol=1e-6, atol=1e-6)


def repeat(x):
    counts = 1 + 2 * (rows(x) == 1).long()
    return x.repeat_interleave(counts, 1, output_size=x.shape[1] + 2)


def test_the_number_of_repeated_rows_may_be_given():
    program = trace(Function(repeat), [torch.randn(2, 7)], [("b", "s")])
    x = torch.randn(3, 10)
    assert torch.equal(run(write(adapt_program(program, 23)), [x])[0], repeat(x))
