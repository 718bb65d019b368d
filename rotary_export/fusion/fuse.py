"""`fuse`: read, normalise, apply the rules, add bodies, compare."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
from onnxscript import ir

from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.fusion.candidates import NotReplaced, examine_node, find_not_replaced, list_names
from rotary_export.fusion.check.arithmetic import find_narrowest_types
from rotary_export.fusion.check.compare import Check, compare_models
from rotary_export.fusion.check.feeds import SHAPES, Shape
from rotary_export.fusion.half_tables import (
    HalfTables,
    find_half_tables,
    widen_tables,
)
from rotary_export.fusion.normalize import normalize
from rotary_export.fusion.operators.apply import MINIMUM_OPSET, write_operators
from rotary_export.fusion.read import (
    SMALL,
    Model,
    explain,
    has_external,
    list_files,
    load_small_tensors,
    read_model,
)
from rotary_export.fusion.result import FuseResult, NothingFusedError
from rotary_export.fusion.rules.apply import apply_rules
from rotary_export.fusion.rules.base import Findings
from rotary_export.fusion.rules.join import is_rotary
from rotary_export.op.onnx_function import add_functions
from rotary_export.op.onnx_schema import register_schema
from rotary_export.proof.report import FLOAT32_TABLES
from rotary_export.types import Array

LARGE = 2**26  # bytes of weights above which they are mapped from a file while the model runs


def fuse(
    model: Model,
    *,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    inputs: Sequence[Mapping[str, Array]] = (),
    float32_tables: bool = False,
    operators: str | None = None,
    dry_run: bool = False,
    examine: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> FuseResult:
    """Put one fused node wherever an ONNX model applies a rotary embedding, and prove it equal.

    It finds `ai.onnx::RotaryEmbedding`, `com.microsoft::RotaryEmbedding` and what exporters write
    with Mul, Add, Slice, Concat, ...: half and interleaved layout, partial, complex. Query and key
    that share their tables become one node. The model runs before and after at three shapes.

    Args:
        model: A model, or the path of a file; neither is changed.
        shapes: (batch, new tokens, cached tokens) of each run; default: `feeds.SHAPES`.
        inputs: Inputs to run with, by name, one mapping for each of the first runs; what is not
            given is random.
        float32_tables: Compute positions, angles and tables in float32 where the model computes
            them in a half type. The model before is then the same one with that part in float32.
        operators: "onnx": attention reads the cache and groups of heads as they are, and norms are
            one node, in operators of ai.onnx 23. None: only rotary embeddings are replaced.
        dry_run: Find the rotary embeddings and stop: nothing runs, and the result can't be saved.
        examine: Nodes, by their name or that of an output, that `FuseResult.why` includes although
            they do not look like a rotary embedding.
        progress: Called with what is being done.

    Returns:
        The fused model and what was found; `save` writes it.

    Raises:
        RotaryExportError: The model can't be read, is of an opset that is too new or too old, its
            external data is missing, it has no such node, or it does not run at any shape.
        NothingFusedError: No rotary embedding was found, or none could be replaced.
        CheckFailedError: The outputs differ, or tables are computed in a half type.
    """
    report_progress = progress or (lambda _: None)
    tried = SHAPES if shapes is None else _read_shapes(shapes)
    if not isinstance(inputs, Sequence) or not all(isinstance(given, Mapping) for given in inputs):
        raise RotaryExportError("inputs must be a sequence of dicts by input name")
    if operators not in (None, "onnx"):
        raise RotaryExportError(f"operators must be 'onnx' or None, got {operators!r}")
    report_progress("read the model")
    source = read_model(model)
    opset = source.graph.opset_imports.get("", 0)
    if operators and opset < MINIMUM_OPSET:
        raise RotaryExportError(
            f"operators='onnx' requires a model of opset >= {MINIMUM_OPSET}, got opset {opset}"
        )
    register_schema()
    with tempfile.TemporaryDirectory(prefix="rotary_export.") as temporary:
        folder = _find_folder(model, source)
        sources = list_files(model, source)
        was_inline = folder is None
        with explain(model, "is damaged"):
            load_small_tensors(source)
            if was_inline and not dry_run and _count_bytes(source) > LARGE:
                folder = Path(temporary)
                ir.external_data.unload_from_model(
                    source, folder, "weights", size_threshold_bytes=SMALL
                )
            after = source.clone()
        report_progress("find the rotary embedding")
        with explain(model, "can't be fused"):
            found = _rewrite(after, examine, operators)
            half = left = find_half_tables(source, after, found.fused)
            notes: list[str] = []
            if half.types and float32_tables:
                source, notes = widen_tables(source, half.turns)
                after = source.clone()
                found = _rewrite(after, examine, operators)
                left = find_half_tables(source, after, found.fused)
            if not dry_run:
                _check_tables(left, len(found.fused), float32_tables)
            proto = ir.serde.serialize_model(after)
            add_functions(proto)
        proto.ir_version = max(proto.ir_version, source.ir_version)
        narrowest = find_narrowest_types(after, found.fused)
        if dry_run:
            check = Check(skipped=["all shapes: this is a dry run"])
        else:
            report_progress("run before and after")
            check = compare_models(
                source, proto, list(found.fused), folder, tried, inputs, narrowest
            )
            check.notes += [FLOAT32_TABLES] if half.types else []
        check.notes += [f"{count} {what}" for what, count in found.operators.items() if count]
        check.notes += notes
        if was_inline and folder is not None:
            proto = _load_weights(proto, folder)
    folder = None if was_inline else folder
    return FuseResult(
        proto, folder, sources, found.nodes, found.fused, found.why, check, half.types, narrowest
    )


@dataclass(frozen=True)
class _Replaced:
    """What was found in a model: see `FuseResult`."""

    nodes: int
    fused: Mapping[str, str]
    why: tuple[NotReplaced, ...]
    operators: Mapping[str, int] = field(default_factory=dict)  # as of `write_operators`


def _rewrite(model: ir.Model, examine: Sequence[str], operators: str | None) -> _Replaced:
    found = replace_rotations(model, examine)
    return replace(found, operators=write_operators(model)) if operators else found


def replace_rotations(model: ir.Model, examine: Sequence[str]) -> _Replaced:
    """Normalise a model and replace its rotary embeddings, in place.

    Raises:
        NothingFusedError: Nothing was replaced.
        RotaryExportError: A node to examine does not exist.
    """
    names = list_names(model)
    normalize(model)
    findings = apply_rules(model)
    why = find_not_replaced(model, findings, names)
    nodes = sum(is_rotary(node) for node in model.graph.all_nodes())
    for name in examine:
        if not any(name in (each.node, each.output) for each in why):
            found = examine_node(name, names, model, findings)
            why += [found] if found is not None else []
    _check_found(findings, why, nodes)
    return _Replaced(nodes, findings.fused, tuple(why))


def _check_found(findings: Findings, why: Sequence[NotReplaced], nodes: int) -> None:
    if findings.fused:
        return
    candidates = sum(each.candidate for each in why)
    if nodes and not candidates:
        message = f"the model is fused already: {nodes} node{'s' * (nodes > 1)}"
    elif not candidates:
        message = "the model has no rotary embedding that fuse recognises, nothing was replaced"
    else:
        message = (
            f"none of the {candidates} rotary calls could be replaced: {why[0].node}: "
            f"{why[0].reason}"
        )
    raise NothingFusedError(message, why)


def _check_tables(half: HalfTables, calls: int, float32_tables: bool) -> None:
    """Refuse tables in a half type: equal outputs before and after would prove nothing."""
    if not half.types:
        return
    name, dtype = next(iter(half.types.items()))
    reason = (
        f"tables computed in {dtype} in {len(half.types)} of {calls} rotary calls, the first of "
        f"which is {name}: that is wrong from a few hundred positions on, and runtimes do not "
        "agree on it"
    )
    if float32_tables:
        raise CheckFailedError(f"{reason}; they can't be put back to float32")
    raise CheckFailedError(
        f"{reason}; pass float32_tables=True (--float32-tables) to compute them in float32"
    )


def _read_shapes(shapes: Sequence[tuple[int, int, int]]) -> tuple[Shape, ...]:
    for shape in shapes:
        whole = isinstance(shape, Sequence) and all(type(size) is int for size in shape)
        if not whole or len(shape) != 3 or min(shape[:2]) < 1 or shape[2] < 0:
            raise RotaryExportError(
                "shapes must be of (batch >= 1, new tokens >= 1, cached tokens >= 0), got "
                f"{shape!r}"
            )
    if not shapes:
        raise RotaryExportError("shapes must contain at least one shape")
    return tuple(Shape(*shape) for shape in shapes)


def _find_folder(model: Model, source: ir.Model) -> Path | None:
    if isinstance(model, onnx.ModelProto) or not has_external(source):
        return None
    return Path(model).absolute().parent


def _count_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)


def _load_weights(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    model = ir.serde.deserialize_model(proto)
    ir.external_data.set_base_dir(model.graph, folder)
    return ir.serde.serialize_model(ir.external_data.load_to_model(model))
