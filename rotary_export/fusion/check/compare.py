"""Run a model before and after, and compare its outputs and those of every rotary call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnxscript import ir

from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.fusion.check.arithmetic import PRECISION
from rotary_export.fusion.check.feeds import SHAPES, Shape, make_feeds
from rotary_export.fusion.check.runs import (
    BY_REFERENCE,
    Outputs,
    find_ways,
    run_before,
    run_fused,
    run_reference,
)
from rotary_export.proof.comparison import Error, compare
from rotary_export.proof.oracle import compute_ulp
from rotary_export.proof.tolerances import TOLERANCES
from rotary_export.runtime.ways import REFERENCE
from rotary_export.types import Array


@dataclass(frozen=True)
class Comparison:
    """One way to run the fused model, at one shape.

    Attributes:
        shape: Batch, new tokens, tokens in the cache.
        runtime: What ran the fused model.
        run_mode: How the model ran before: `AS_IT_IS`, `ROW_BY_ROW` or `BY_REFERENCE`.
        error: The largest, in ulp of the largest magnitude of its vector or output.
        output: Where it is.
        allowed: The limit.
    """

    shape: Shape
    runtime: str
    run_mode: str
    error: Error
    output: str
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit."""
        return self.error.max_ulp <= self.allowed


@dataclass
class Check:
    """What was compared.

    Attributes:
        comparisons: One per shape and runtime.
        skipped: Shapes and runtimes that were not, and why.
        notes: What the model before is, if it is not as it was read.
    """

    comparisons: list[Comparison] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare_models(
    before: ir.Model,
    after: onnx.ModelProto,
    observed: Sequence[str],
    folder: Path | None,
    shapes: Sequence[Shape] = SHAPES,
    feeds: Sequence[Mapping[str, Array]] = (),
    narrowest: Mapping[str, str] | None = None,
) -> Check:
    """Run a model before and after at several shapes.

    Args:
        before: The model as it was.
        after: The fused one, with its function bodies.
        observed: Values of both, compared besides the outputs.
        folder: Of their external data, if they have any.
        shapes: What to run at.
        feeds: Inputs to run with instead.
        narrowest: Types that values are judged by, as of `find_narrowest_types`; default: their
            own.

    Returns:
        What was compared, all within its limit.

    Raises:
        CheckFailedError: Something differs, or the fused model does not run where it did before.
        RotaryExportError: The model runs at no shape before.
    """
    cases = [
        make_feeds(before.graph, shape, seed, feeds[seed] if seed < len(feeds) else None)
        for seed, shape in enumerate(shapes)
    ]
    check = Check()
    made = {output.name for node in before.graph for output in node.outputs}
    inside = [name for name in observed if name not in made]
    if inside:
        check.skipped.append(
            f"{', '.join(inside)}: inside a subgraph, compared by the model's outputs alone, and "
            "not at all in a branch that does not run"
        )
    old = _observe(ir.serde.serialize_model(before), observed)
    runs, run_modes = run_before(old, folder, cases, shapes, check.skipped)
    new = _observe(after, observed)
    if all(isinstance(run, str) for run in runs):
        reason = runs[0]
        runs, run_modes = run_reference(old, cases), [BY_REFERENCE] * len(cases)
        if all(isinstance(run, str) for run in runs):
            raise RotaryExportError(f"the model can't be verified, it runs at no shape: {reason}")
    for way in find_ways(check.skipped):
        name = way.name
        results = run_fused(new, folder, cases, shapes, run_modes, way.use_op_library)
        if all(isinstance(r, str) for r in results) and run_modes[0] == BY_REFERENCE:
            name, results = REFERENCE.name, run_reference(new, cases)
        for shape, want, got, run_mode in zip(shapes, runs, results, run_modes, strict=True):
            if isinstance(want, str):
                continue
            if isinstance(got, str):
                raise CheckFailedError(
                    f"the fused model does not run at batch {shape.batch}, length {shape.length} "
                    f"({name}), the model did before: {got}"
                )
            row = _compare(want, got, shape, name, run_mode, observed, narrowest or {})
            check.comparisons.append(row)
    for row in check.comparisons:
        if not row.passed:
            raise CheckFailedError(
                f"the fused model is not equal to the model, nothing was written: {row.output} "
                f"differs by {row.error.max_ulp:.3g} ulp of its largest magnitude at "
                f"{row.error.worst} ({row.allowed:g} are allowed; batch {row.shape.batch}, length "
                f"{row.shape.length}, {row.runtime})"
            )
    return check


def _observe(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a model with more outputs; external weights are shared."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    outputs = {value.name for value in copy.graph.output}
    made = {name for node in copy.graph.node for name in node.output}
    known = {value.name: value for value in copy.graph.value_info}
    for name in names:
        if name in made and name not in outputs:
            output = copy.graph.output.add(name=name)
            if name in known:
                element = known[name].type.tensor_type.elem_type
                output.type.tensor_type.elem_type = element
    return copy


def _compare(
    want: Outputs,
    got: Outputs,
    shape: Shape,
    runtime: str,
    run_mode: str,
    observed: Sequence[str],
    narrowest: Mapping[str, str],
) -> Comparison:
    """Compare all outputs of one run; keep the one that is nearest to its limit."""
    worst = Comparison(shape, runtime, run_mode, Error(), "", TOLERANCES["native"].max_ulp)
    for name, value in want.items():
        dtype = value.dtype.name
        if dtype not in PRECISION:
            same = got[name].shape == value.shape and np.array_equal(got[name], value)
            error = Error() if same else Error(np.inf, np.inf, exact=False)
            allowed = 0.0
        else:
            wide = np.abs(value.astype(np.float64))
            axis = -1 if name in observed and value.ndim else None
            largest = wide.max(axis, keepdims=True) if value.size else np.ones((1,) * value.ndim)
            dtype = narrowest.get(name, dtype)
            error = compare(got[name], value, compute_ulp(largest, dtype))
            half = dtype in ("float16", "bfloat16")
            allowed = TOLERANCES["fused-half" if half else "fused"].max_ulp
        row = Comparison(shape, runtime, run_mode, error, name, allowed)
        if error.max_ulp / max(allowed, 1e-9) >= worst.error.max_ulp / max(worst.allowed, 1e-9):
            worst = row
    return worst
