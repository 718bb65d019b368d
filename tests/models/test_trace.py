"""Tracing tiny modules with dynamic sizes: specialised sizes, guards, names of output sizes."""

import math

import pytest
import torch
from helpers.tiny_modules import X, rope_of
from torch import nn

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.errors import RotaryExportError
from rotary_export.models.error_text import describe_error
from rotary_export.models.trace.guards import read_conditions
from rotary_export.models.trace.program import (
    get_inputs,
    get_outputs,
    name_shape,
    name_symbols,
    trace_program,
)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def trace(function, *named):
    """Trace a function of (tensor, dims) arguments; return the program and its inputs."""
    infos = tuple(TensorInfo(f"x{n}", "float32", dims) for n, (_, dims) in enumerate(named))
    return trace_program(Function(function), [tensor for tensor, _ in named], infos), infos


def list_conditions(function, *named):
    program, infos = trace(function, *named)
    return read_conditions(program, get_inputs(program), infos)


DIMS = ("b", "s", 16)


def test_a_specialised_size_is_an_error_with_its_line():
    message = (
        r"tracing specialises s to the constant 6 \(dimension 1 of x0\), at .*test_trace\.py, "
        "line .*; give it a fixed size with dynamic_shapes, or change the model there"
    )
    with pytest.raises(RotaryExportError, match=message):
        trace(lambda x: x.reshape(x.shape[0], int(x.shape[1]), 16), (X, DIMS))


def add_root(x):
    return x + torch.arange(int(x.shape[1] ** 0.5 + 0.5)).repeat(3)[:, None]


@pytest.mark.parametrize("function", [lambda x: x * math.log(x.shape[1] + 3), add_root])
def test_the_line_of_a_size_in_an_expression(function):
    message = r"specialises s to the constant 9 \(dimension 1 of x0\), at .*test_trace\.py, line"
    with pytest.raises(RotaryExportError, match=message):
        trace(function, (torch.randn(2, 9, 16), DIMS))


def test_what_depends_on_values_is_an_error_with_its_line():
    with pytest.raises(RotaryExportError, match=r"can't trace the model: .*test_trace\.py:\d+"):
        trace(lambda x: x if x.sum() > 1 else x + 1, (X, DIMS))


def test_sizes_of_results_are_named():
    program, infos = trace(
        lambda x, y: (torch.cat((x, y), 1), x[:, 1:], x.flatten(0, 1), x.mean((0, 1))),
        (X, DIMS),
        (torch.randn(2, 4, 16), ("b", "past", 16)),
    )
    names = name_symbols(program, infos)
    shapes = [name_shape(value.shape, names, "y") for value in get_outputs(program)]
    assert shapes[0] == ("b", "past + s", 16)
    assert shapes[1] == ("b", "y.1", 16)
    assert shapes[2] == ("y.0", 16)
    assert shapes[3] == (16,)


def test_a_cache_may_be_empty():
    dims = ("b", "past", 16)
    program, _ = trace(
        lambda x, past, mask: torch.cat((past, x), 1) * mask[..., None],
        (X, DIMS),
        (torch.randn(2, 4, 16), dims),
        (torch.ones(2, 10), ("b", "past + s")),
    )
    x, past = torch.randn(2, 3, 16), torch.randn(2, 0, 16)
    got = program.module()(x, past, torch.ones(2, 3))
    assert torch.equal(got, x)


def test_a_branch_is_a_condition_with_its_line():
    (condition,) = list_conditions(lambda x: x * (2 if x.shape[1] > 40 else 1), (X, DIMS))
    assert condition.names == ("s",)
    assert condition.is_guard
    assert condition.holds(40)
    assert not condition.holds(41)
    assert condition.text.startswith("s <= 40, at ")
    assert "test_trace.py, line" in condition.text


def test_a_condition_on_two_sizes():
    (condition,) = list_conditions(
        lambda x: x * (2 if x.shape[0] * x.shape[1] > 40 else 1), (X, DIMS)
    )
    sizes = dict(zip(condition.names, (5, 8), strict=True))
    assert sorted(sizes) == ["b", "s"]
    assert condition.holds(5, 8)
    assert not condition.holds(5, 9)


def test_a_sum_of_sizes_is_written_in_its_terms():
    (condition,) = list_conditions(
        lambda x, past, mask: torch.cat((past, x), 1) * (2 if mask.shape[1] > 40 else 1),
        (X, DIMS),
        (torch.randn(2, 4, 16), ("b", "past", 16)),
        (torch.ones(2, 10), ("b", "past + s")),
    )
    assert sorted(condition.names) == ["past", "s"]
    assert condition.holds(20, 20)
    assert not condition.holds(20, 21)


def test_a_maximum_is_a_condition_but_not_a_guard():
    conditions = list_conditions(lambda x: x * max(1, x.shape[1] - 30), (X, DIMS))
    (condition,) = [c for c in conditions if not c.is_guard]
    assert condition.text.startswith("max(1, s - 30) == ")
    assert condition.holds(31)
    assert not condition.holds(32)


def test_no_condition_without_a_branch():
    assert list_conditions(rope_of, (X, DIMS)) == []


def test_a_size_at_which_a_condition_fails_to_compute():
    (condition,) = list_conditions(
        lambda x: x * (2 if 100 % (x.shape[1] - 5) == 3 else 1), (X, DIMS)
    )
    assert condition.holds(7)
    assert not condition.holds(5)


ERRORS = {
    "one line": (ValueError("bad\nworse"), "ValueError: bad"),
    "a title": (ValueError("\nIt failed:\n  bad"), "ValueError: It failed: bad"),
    "nothing": (SystemExit(), "SystemExit: "),
    "a frame": (
        ValueError('bad\nFile "/a/site-packages/my/code.py", line 3, in forward\n'
                   'File "/a/site-packages/torch/nn.py", line 4, in call'),
        "ValueError: bad (at my/code.py:3, forward)",
    ),
    "a cause": (
        ValueError("bad\nCaused by: (/x/y.py:7 in turn)"),
        "ValueError: bad (at /x/y.py:7, turn)",
    ),
    "long": (ValueError("x" * 1000), "ValueError: " + "x" * 300),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_an_error_in_one_line(case):
    error, text = case
    assert describe_error(error) == text
