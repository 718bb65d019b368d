"""`GRAPH.inlined.onnx`: the graph without model-local functions, which some runtimes can't run.

OpenVINO gets the function bodies of the bundle, tract gets primitives of opset 18. The file lies
beside `bundle/`, whose `.onnx_data` file it shares: the weights are in the kit once. It is compared
with the bundle's own graph first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rotary_export.bundle.manifest import (
    DATA_SUFFIX,
    FILE_NAME,
    Manifest,
    TensorInfo,
    hash_file,
)
from rotary_export.deploy.example import make_example, run_by_position
from rotary_export.deploy.signature import write_decoder
from rotary_export.errors import CheckFailedError, RotaryExportError, first_line
from rotary_export.op.onnx_graph import list_graphs
from rotary_export.proof.sample_inputs import fit_shapes
from rotary_export.runtime.load import open_session
from rotary_export.runtime.onnx_file import check_locations
from rotary_export.runtime.providers import CPU
from rotary_export.runtime.tensors import is_torch

SHAPES = ((2, 7), (3, 1), (1, 5))  # batch_size, seq_len of the comparison
TRACT_OPSET = 18
MAX_INLINE_BYTES = 2**20  # of the bundle's graph; the weights of a larger one get a file


def prepare_openvino(staging: Path, manifest: Manifest, graph: str) -> None:
    """Inline, with the tables of a whole model computed for the whole batch.

    Raises:
        RotaryExportError: OpenVINO does not compute in the bundle's type, or can't be compared.
    """
    if manifest.dtype == "float64":
        raise RotaryExportError(
            "openvino needs a bundle of float32, float16 or bfloat16 (OpenVINO's CPU computes "
            "float64 in float32), got float64"
        )
    if graph == "model" and manifest.dtype == "bfloat16":
        raise RotaryExportError(
            "openvino needs a whole model of float32 or float16 (of bfloat16, ONNX Runtime's CPU "
            "can't run it for comparison), got bfloat16"
        )
    model = _prepare_nodes(_read(staging, manifest, graph))
    _write(model, staging, manifest, graph)
    write_decoder(staging, manifest, graph)


def prepare_tract(staging: Path, manifest: Manifest, graph: str) -> None:
    """Inline primitives of opset 18; shapes stay open, since the kit sets them for each plan.

    Raises:
        RotaryExportError: The bundle has a type that tract lacks, or an operator that opset 18
            lacks.
    """
    import onnx

    from rotary_export.op.onnx_function import add_functions

    if manifest.dtype == "bfloat16":
        raise RotaryExportError(
            "tract needs a bundle of float32, float16 or float64 (it has no bfloat16), got bfloat16"
        )
    model = _read(staging, manifest, graph)
    next(o for o in model.opset_import if o.domain == "").version = TRACT_OPSET
    add_functions(model)
    try:
        _write(model, staging, manifest, graph)
    except onnx.checker.ValidationError as error:
        command = "export-model" if graph == "model" else "export"
        reason = first_line(error)
        raise RotaryExportError(
            f"tract needs a bundle of opset {TRACT_OPSET} (rotary-export {command} --opset "
            f"{TRACT_OPSET}), got opset {manifest.opset}, whose graph is not of opset "
            f"{TRACT_OPSET}: {reason}"
        ) from None


def _read(staging: Path, manifest: Manifest, graph: str) -> Any:
    """Read the bundle's graph; external data stay in `bundle/GRAPH.onnx_data`."""
    import onnx

    file = staging / "bundle" / manifest.graphs[graph].files["onnx"]
    data = file.with_name(f"{file.name}{DATA_SUFFIX}")
    if file.stat().st_size > MAX_INLINE_BYTES and not data.exists():
        _move_weights(file, data, manifest)
    model = onnx.load(file, load_external_data=False)
    check_locations(model, file.name)
    for inner in list_graphs(model.graph):
        for tensor in inner.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"bundle/{entry.value}"
    return model


def _move_weights(file: Path, data: Path, manifest: Manifest) -> None:
    """Move the weights of a kit's copy of a bundle to a file, and name both in its manifest."""
    from onnxscript import ir

    ir.save(ir.load(file), file, external_data=data.name)
    hashes = {each.name: hash_file(each) for each in (file, data) if each.is_file()}
    moved = replace(manifest, files={**manifest.files, **hashes})
    file.with_name(FILE_NAME).write_text(moved.to_json(), encoding="utf-8")


def _prepare_nodes(proto: Any) -> Any:
    """Return the model without what OpenVINO computes wrongly or refuses."""
    from onnxscript import ir

    from rotary_export.fusion.operators.separate import separate_heads

    model = ir.serde.deserialize_model(proto)
    _widen_probes(model)
    separate_heads(model)  # of grouped heads, OpenVINO 2026.4 can't merge the axes
    model.graph.sort()
    return ir.serde.serialize_model(model)


def _widen_probes(model: Any) -> None:
    """Expand each probe of a rotary function to the batch of its X.

    `export_model` calls a function with a constant row of batch 1 and one head for its tables.
    OpenVINO treats this call as a rotary embedding and fuses it to an op whose output has the
    probe's batch: every row would get the positions of the first.
    """
    from onnxscript import ir

    from rotary_export.fusion.rules.join import is_rotary

    done: set[Any] = set()
    for node in model.graph:
        if not is_rotary(node):
            continue
        inputs: Any = node.inputs
        x, cos, sin = inputs[:3]
        if cos.shape[0] == 1:
            continue
        for probe in _find_probes((cos, sin)) - done:
            done.add(probe)
            batch = ir.node("Shape", [x], {"start": 0, "end": 1})
            ones = ir.node("Constant", [], {"value_ints": [1] * (len(probe.shape) - 1)})
            sizes = ir.node("Concat", [batch.outputs[0], ones.outputs[0]], {"axis": 0})
            wide = ir.node("Expand", [probe, sizes.outputs[0]])
            probe.replace_all_uses_with(wide.outputs[0])
            wide.replace_input_with(0, probe)
            model.graph.insert_after(probe.producer(), [batch, ones, sizes, wide])


def _find_probes(tables: Sequence[Any]) -> set[Any]:
    """Return the probes, as `make_probe` of `models/find/lowering.py` makes them, of the tables.

    A probe that is reshaped on the way is not returned: the reshape contains its sizes, and
    OpenVINO does not fuse it. The kit reports any other that OpenVINO does fuse.
    """
    probes, seen, queue = set(), set(), list(tables)
    while queue:
        value = queue.pop()
        node = value.producer()
        if node is None or value in seen:
            continue
        seen.add(value)
        queue.extend(each for each in node.inputs if each is not None)
        if node.op_type != "Expand" or not node.inputs[0].is_initializer():
            continue
        row, shape = node.inputs[0].shape, value.shape
        if len(row) == 1 and shape is not None and len(shape) >= 3 and shape[0] == 1:
            probes.add(value)
    return {probe for probe in probes if not _is_reshaped(probe)}


def _is_reshaped(probe: Any) -> bool:
    """Whether a node between a probe and the rotary nodes has sizes of its own."""
    from rotary_export.fusion.rules.join import is_rotary

    seen, queue = set(), [probe]
    while queue:
        for node, _ in queue.pop().uses():
            if node.op_type in ("Reshape", "Expand", "Tile"):
                return True
            if not is_rotary(node) and node not in seen:
                seen.add(node)
                queue.extend(node.outputs)
    return False


def _write(model: Any, staging: Path, manifest: Manifest, graph: str) -> None:
    """Inline, compare with the bundle's own file, and write."""
    import onnx
    import onnx.inliner

    from rotary_export.op import spec

    # tract compares these sizes with those that the kit sets, and infers them by itself.
    del model.graph.value_info[:]
    model = onnx.inliner.inline_local_functions(model)
    kept = [o for o in model.opset_import if o.domain != spec.DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    file = staging / f"{graph}.inlined.onnx"
    onnx.save(model, file)
    onnx.checker.check_model(str(file))
    _compare(staging, manifest, graph, file.name)


def _compare(staging: Path, manifest: Manifest, graph: str, file: str) -> None:
    """Run the inlined file and the bundle's, without the op library, and compare.

    Raises:
        CheckFailedError: They differ.
    """
    from rotary_export.proof.comparison import compare
    from rotary_export.proof.oracle import compute_ulp

    shapes = fit_shapes(manifest, graph, SHAPES)
    cases = _make_cases(staging / "bundle", manifest, graph, shapes)
    info = replace(manifest.graphs[graph], files={"onnx": file})
    expected = _run(staging / "bundle", manifest, graph, cases)
    got = _run(staging, replace(manifest, graphs={graph: info}), graph, cases)
    for shape, ours, theirs in zip(shapes, got, expected, strict=True):
        for output in info.outputs:
            left, right = ours[output.name], theirs[output.name]
            judged_by, allowed = _find_allowed(manifest, graph, output)
            is_float = "float" in output.dtype
            largest = np.abs(right.astype(np.float64)).max(initial=0)
            unit = compute_ulp(largest, judged_by) if is_float else np.asarray(1.0)
            error = compare(left, right, unit)
            if not error.max_ulp <= (allowed if is_float else 0):
                raise CheckFailedError(
                    f"the inlined graph is not equal to the bundle's, nothing was written: "
                    f"{output.name} differs by {error.max_ulp:.3g} ulp of its largest magnitude at "
                    f"{error.worst} ({allowed:g} are allowed; batch_size, seq_len {shape})"
                )


def _find_allowed(manifest: Manifest, graph: str, output: TensorInfo) -> tuple[str, float]:
    """Return the type whose ulp counts, and the largest error, of a model that of its proof."""
    from rotary_export.proof.tolerances import FUSED, TOLERANCES, judge_fused

    if FUSED in manifest.config:
        judged_by, name = judge_fused(manifest.config, output.name, output.dtype)
        return judged_by, TOLERANCES[name].max_ulp
    if graph == "model":
        rows = [row for row in manifest.parity["rows"] if row["output"] == output.name]
        return output.dtype, max(float(row["eager_allowed"]) for row in rows)
    half = output.dtype in ("float16", "bfloat16")
    xpos = manifest.config.get("embedding", {}).get("use_xpos", False)
    name = "native-half" if half else "native-xpos" if xpos else "native"
    return output.dtype, TOLERANCES[name].max_ulp


def _make_cases(
    folder: Path, manifest: Manifest, graph: str, shapes: Sequence[tuple[int, int]]
) -> list[Mapping[str, Any]]:
    session = open_session(folder, manifest, graph, "onnxruntime", [CPU], use_op_library=False)
    return [make_example(manifest, graph, *shape, run_by_position(session)) for shape in shapes]


def _run(
    folder: Path, manifest: Manifest, graph: str, cases: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Run every case in one session, which is released afterwards."""
    from rotary_export.proof.comparison import to_comparable

    session = open_session(folder, manifest, graph, "onnxruntime", [CPU], use_op_library=False)
    results = []
    for case in cases:
        outputs = session(**case).items()
        results.append({name: to_comparable(v) if is_torch(v) else v for name, v in outputs})
    return results
