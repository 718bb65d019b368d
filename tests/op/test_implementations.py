"""Every implementation of the op, on every case: eager's bits, or near the oracle.

What only one implementation promises is tested in a file of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx.inliner
import pytest
import torch
from helpers import torch_calls
from helpers.cases import CASES, EDGES, LONG, PAIRWISE, Case, check_each, group_cases
from helpers.function_bodies import (
    from_numpy,
    load_without_library,
    make_model,
    make_with_bodies,
    run_bound,
    to_numpy,
)
from helpers.op_library import run_session
from helpers.oracles import Expected, Tensors, assert_same_bits, assert_within
from onnx.reference import ReferenceEvaluator

from rotary_export.op import cpu_kernel
from rotary_export.op.onnx_reference import RotaryEmbedding
from rotary_export.op.onnx_signature import NATIVE_OPSET

OPSETS = range(18, 26)
Run = Callable[[Case, Tensors], list[torch.Tensor]]


@dataclass(frozen=True)
class Implementation:
    """One way to compute the op.

    Attributes:
        run: From the inputs of a case to Y, and key_out if the case has a key.
        cases: That it must compute.
        fuses_float32: It may use FMA in float32: near the oracle, but not eager's bits.
    """

    run: Run
    cases: Sequence[Case] = tuple(CASES + LONG)
    fuses_float32: bool = False


def run_aten(case: Case, inputs: Tensors) -> list[torch.Tensor]:
    """Run the torch op where the op library is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernel, "_find_library", lambda: None)
        return torch_calls.run(case, inputs)


def run_library(case: Case, inputs: Tensors) -> list[torch.Tensor]:
    """Run the op library in ONNX Runtime."""
    return run_session(inputs, **case.attributes)


def run_reference(case: Case, inputs: Tensors) -> list[torch.Tensor]:
    """Run the ONNX reference evaluator."""
    evaluator = ReferenceEvaluator(make_model(case), new_ops=[RotaryEmbedding])
    outputs = evaluator.run(None, {name: to_numpy(x) for name, x in inputs.items()})
    return [from_numpy(y) for y in outputs]


def make_body(
    opset: int, *, dynamic: bool, inlined: bool = False, cases: Sequence[Case] = tuple(CASES)
) -> Implementation:
    """Return the function body in ONNX Runtime, inlined by ONNX Runtime or beforehand by onnx."""

    def run(case: Case, inputs: Tensors) -> list[torch.Tensor]:
        model = make_with_bodies(case, opset=opset, dynamic=dynamic)
        if inlined:
            model = onnx.inliner.inline_local_functions(model)
        return run_bound(load_without_library(model), inputs)

    return Implementation(run, cases, fuses_float32=opset >= NATIVE_OPSET)


IMPLEMENTATIONS = {
    "torch-op": Implementation(torch_calls.run),
    "torch-op-aten": Implementation(run_aten),
    "op-library": Implementation(run_library),
    "onnx-reference": Implementation(run_reference),
    "body-primitive": make_body(18, dynamic=False),
    "body-native": make_body(23, dynamic=True),
    "inlined-primitive": make_body(18, dynamic=True, inlined=True, cases=PAIRWISE + EDGES),
    "inlined-native": make_body(23, dynamic=True, inlined=True, cases=PAIRWISE + EDGES),
    **{f"body-{opset}": make_body(opset, dynamic=True, cases=PAIRWISE) for opset in OPSETS},
    **{f"body-{opset}-static": make_body(opset, dynamic=False, cases=PAIRWISE) for opset in OPSETS},
}
ITEMS = {
    f"{name}-{group}": (implementation, cases)
    for name, implementation in IMPLEMENTATIONS.items()
    for group, cases in group_cases(implementation.cases).items()
}


@functools.cache
def draw(case: Case) -> tuple[Tensors, Tensors, list[torch.Tensor], list[Expected]]:
    """Return inputs, a copy, eager's outputs and the oracle's: once for all implementations."""
    inputs = case.make_inputs(1)
    copy = {name: x.clone() for name, x in inputs.items()}
    return inputs, copy, case.compute_eager(inputs), case.compute_expected(inputs)


@pytest.mark.parametrize(("implementation", "cases"), ITEMS.values(), ids=ITEMS)
def test_every_implementation_has_eager_s_bits_or_is_near_the_oracle(implementation, cases):
    def check(case: Case) -> None:
        inputs, before, eager, expected = draw(case)
        outputs = implementation.run(case, inputs)
        may_differ = implementation.fuses_float32 and case.types[0] != "float64"
        for got, want, oracle in zip(outputs, eager, expected, strict=True):
            assert_within(got, oracle, case.max_ulp)
            if not may_differ:
                assert_same_bits(got, want)
        for name, x in inputs.items():
            assert_same_bits(x, before[name], f"{name} was written to")

    check_each(cases, check)
