"""The tables that each rotary node reads, up to the last position that a model allows.

Only the part of a graph that computes them is run, so that a hundred thousand positions cost
little. The part of the ONNX file is compared with the same part of the traced program, which runs
the model's own operators in PyTorch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnxscript import ir
from torch import Tensor

from rotary_export.bundle.dims import PAST, SEQ
from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.op.spec import DOMAIN, OP_TYPE
from rotary_export.proof.comparison import compare, to_comparable
from rotary_export.proof.models.cases import CaseSpec, make_case
from rotary_export.proof.models.plan import Plan
from rotary_export.proof.oracle import compute_ulp
from rotary_export.proof.report import Row
from rotary_export.runtime.ort import OrtSession
from rotary_export.runtime.providers import CPU
from rotary_export.runtime.session import resolve_shape
from rotary_export.runtime.tensors import to_torch

TABLES = {"cos_cache": 1, "sin_cache": 2, "scale_cache": 5}  # inputs of a rotary node
Tables = Mapping[str, Tensor]  # of one rotary node, by name
ComputeTables = Callable[[Mapping[str, Tensor]], Sequence[Tables]]
RUNTIME = "ONNX Runtime, tables alone"
_FARTHEST = 1 << 17  # positions, where no input moves them
_MOST_ELEMENTS = 1 << 26  # of an input
_UNKNOWN_LAST = 1 << 15


def plan_far(plan: Plan) -> list[CaseSpec]:
    """Choose where tables are compared: at the last position, and around every threshold.

    Where positions are an input, a few rows at each place do. Elsewhere the sequence must be as
    long as the place is far.
    """
    if SEQ not in plan.traced or (SEQ in plan.max_size and not plan.moves):
        lengths = [plan.max_size[SEQ]] if SEQ in plan.traced else []
        return [CaseSpec(plan.choose_sizes(1, length, 0)) for length in lengths]
    last = max(plan.last or _UNKNOWN_LAST, *plan.thresholds, 0)
    places = sorted({last, *(size + step for size in plan.thresholds for step in (0, 1))})
    if not plan.moves:
        return [CaseSpec(plan.choose_sizes(1, min(p, _FARTHEST), 0)) for p in places]
    sizes = plan.choose_sizes(1, 4, 1)
    before = sum(size for name, size in sizes.items() if name.endswith(SEQ))
    return [CaseSpec(sizes, offset=max(place - before, 0)) for place in places]


def compare_far_tables(
    file: Path,
    info: GraphInfo,
    minimum_onnxruntime: Mapping[str, str],
    needed: set[str],
    compute: ComputeTables,
    plan: Plan,
) -> tuple[list[Row], dict[str, str]]:
    """Compare the tables that the rotary nodes of an ONNX file read with those of the program.

    Args:
        file: The ONNX file.
        info: Its graph.
        minimum_onnxruntime: As in the manifest.
        needed: Names of the inputs that the tables depend on.
        compute: The traced program's tables.
        plan: What the cases depend on.

    Returns:
        A row for each kind of table, and what could not be compared, with the reason.

    Raises:
        CheckFailedError: ONNX Runtime does not compute the tables.
    """
    infos = [each for each in info.inputs if each.name in needed]
    specs, left_out = _fit(plan_far(plan), infos)
    if not specs:
        return [], left_out | {"tables at far positions": f"no size is named {SEQ}"}
    try:
        found, names = _cut_tables(file, infos)
        with tempfile.TemporaryDirectory() as folder:
            ir.save(found, path := Path(folder, "tables.onnx"))
            outputs = tuple(_describe(value) for value in found.graph.outputs)
            graph = replace(info, inputs=tuple(infos), outputs=outputs, rotary_nodes=0)
            session = OrtSession(path, "tables", graph, [CPU], False, False, minimum_onnxruntime)
            rows: dict[str, Row] = {}
            for spec in specs:
                spec, tensors, want = _compute_farthest(spec, infos, plan, compute, left_out)
                # Constant tables depend on no input: a session returns arrays then.
                got = {n: to_torch(value) for n, value in session(**tensors).items()}
                _compare_tables(rows, spec, want, got, names)
    except RotaryExportError as error:
        raise CheckFailedError(f"the tables of {file.name} can't be computed: {error}") from error
    return list(rows.values()), left_out


def _fit(
    specs: Sequence[CaseSpec], infos: Sequence[TensorInfo]
) -> tuple[list[CaseSpec], dict[str, str]]:
    """Shorten what has inputs too large to be made; say what was left out."""
    fitted, left_out = [], {}
    for spec in specs:
        largest = max((int(np.prod(resolve_shape(i, spec.sizes))) for i in infos), default=0)
        length = spec.length
        if largest > _MOST_ELEMENTS:
            length = max(2, length * _MOST_ELEMENTS // largest)
            left_out[f"tables past position {length}"] = f"an input of {largest} elements"
            spec = replace(spec, sizes={**spec.sizes, SEQ: length})
        fitted.append(spec)
    return fitted, left_out


def _compute_farthest(
    spec: CaseSpec,
    infos: Sequence[TensorInfo],
    plan: Plan,
    compute: ComputeTables,
    left_out: dict[str, str],
) -> tuple[CaseSpec, dict[str, Tensor], Sequence[Tables]]:
    """Compute tables as far as a model's own end; a table that it gathers from has an end."""

    def run(spec: CaseSpec) -> tuple[CaseSpec, dict[str, Tensor], Sequence[Tables]]:
        case = make_case(infos, plan.sources, spec)
        tensors = {i.name: t for i, t in zip(infos, case.tensors, strict=True)}
        return spec, tensors, compute(tensors)

    def move(place: int) -> CaseSpec:
        if plan.moves:
            return replace(spec, offset=place)
        return replace(spec, sizes={**spec.sizes, SEQ: place})

    try:
        return run(spec)
    except (IndexError, RuntimeError) as error:  # what torch's operators raise
        low, high = (0, spec.offset) if plan.moves else (2, spec.sizes[SEQ])
        if low >= high:
            raise RotaryExportError(f"the model fails at {spec.sizes}: {error}") from error
    found = run(move(low))
    while high - low > 1:
        middle = (low + high) // 2
        try:
            found, low = run(move(middle)), middle
        except (IndexError, RuntimeError):
            high = middle
    left_out[f"tables past position {_count_positions(found[0]) - 1}"] = "the model fails there"
    return found


def _count_positions(spec: CaseSpec) -> int:
    return spec.offset + sum(size for name, size in spec.sizes.items() if name.endswith(SEQ))


def _cut_tables(file: Path, infos: Sequence[TensorInfo]) -> tuple[ir.Model, list[dict[str, str]]]:
    """Return the part of a model that computes tables, and the names of each node's tables."""
    model = ir.load(file)
    nodes = [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, OP_TYPE)]
    names = [
        {
            name: str(value.name)
            for name, index in TABLES.items()
            if index < len(node.inputs) and (value := node.inputs[index]) is not None
        }
        for node in nodes
    ]
    wanted = list(dict.fromkeys(name for tables in names for name in tables.values()))
    inputs = [str(value.name) for value in model.graph.inputs]
    graph = ir.convenience.extract(model.graph, inputs, wanted)
    kept = {info.name for info in infos}
    graph.inputs[:] = [value for value in graph.inputs if value.name in kept]
    return ir.Model(graph, ir_version=model.ir_version), names


def _describe(value: ir.Value) -> TensorInfo:
    """Describe a table whose sizes only ONNX Runtime finds out."""
    rank = 1 if value.shape is None else len(value.shape)
    dims = tuple(f"size {axis} of {value.name}" for axis in range(rank))
    dtype = ir.DataType.FLOAT if value.dtype is None else value.dtype
    return TensorInfo(str(value.name), dtype.numpy().name, dims)


def _compare_tables(
    rows: dict[str, Row],
    spec: CaseSpec,
    want: Sequence[Tables],
    got: Mapping[str, Tensor],
    names: Sequence[Mapping[str, str]],
) -> None:
    """Compare the tables of every node; each row keeps the largest error."""
    last = _count_positions(spec)
    counted = not spec.offset and not spec.sizes.get(PAST)
    done: set[tuple[int, str]] = set()  # layers share their tables
    for tables, outputs in zip(want, names, strict=True):
        for name, output in outputs.items():
            if (id(tables[name]), output) in done:
                continue
            done.add((id(tables[name]), output))
            right, left = to_comparable(tables[name]), to_comparable(got[output])
            largest = float(np.abs(right).max(initial=1.0))
            if counted and right.ndim > 1:  # of samples of audio, there are fewer positions
                last = min(last, right.shape[-2])
            # The rounding of the angle, which is at most the position, is an error of its cosine.
            unit = compute_ulp(np.asarray(max(last, 1.0)), "float32") * largest
            error = compare(left.astype(right.dtype), right, unit.reshape(1))
            label = f"positions up to {last - 1}"
            row = Row("tables", name, RUNTIME, "", "far-tables", None, error, case=label)
            if name not in rows or error.max_ulp >= rows[name].eager.max_ulp:
                rows[name] = row
