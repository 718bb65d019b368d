"""The facts that `inspect` and `doctor` print."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from rotary_export.bundle.manifest import TensorInfo, read_manifest
from rotary_export.bundle.staging import describe_kept
from rotary_export.errors import RotaryExportError, explain_damage
from rotary_export.op import library as op_library
from rotary_export.op import spec
from rotary_export.op.onnx_graph import list_nodes
from rotary_export.package import find_versions
from rotary_export.runtime.providers import CPU, CUDA, find_cuda_problem, library_refusal

ROTARY_OPS = {"RotaryEmbedding", "MRotaryEmbedding"}
PACKAGES = ("rotary_export", "numpy", "torch", "onnx", "onnxscript", "ml_dtypes")


def inspect_path(path: Path) -> dict[str, Any]:
    """Describe a bundle or an ONNX file.

    Args:
        path: A bundle's folder, or an .onnx file.

    Returns:
        Facts by name; a list contains the rows of one table.

    Raises:
        RotaryExportError: It is neither.
    """
    if not path.is_dir() and not path.is_file():
        raise RotaryExportError(f"{path} does not exist{describe_kept(path)}")
    with explain_damage(f"{path} can't be inspected"):
        return _inspect_bundle(path) if path.is_dir() else _inspect_onnx(path)


def _format_tensor(info: TensorInfo) -> str:
    return f"{info.name}: {info.dtype}({', '.join(str(d) for d in info.shape)})"


def _inspect_bundle(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    graphs = [
        {
            "graph": name,
            "inputs": [*map(_format_tensor, graph.inputs)],
            "outputs": [*map(_format_tensor, graph.outputs)],
            "rotary nodes": graph.rotary_nodes,
            "without the op library": graph.function_body,
        }
        for name, graph in manifest.graphs.items()
    ]
    files = [
        {
            "file": name,
            "bytes": (path / name).stat().st_size if (path / name).is_file() else "missing",
            "sha256": digest,
        }
        for name, digest in manifest.files.items()
    ]
    config = {k: v for k, v in manifest.config.items() if k not in ("embedding", "graphs")}
    for other in manifest.config.get("graphs", {}).values():
        for key in ("rotary", "cases"):
            if isinstance(config.get(key), list) and isinstance(other.get(key), list):
                config[key] = config[key] + other[key]
    if isinstance(config.get("cases"), list):
        config["cases"] = [_summarize_case(each) for each in config["cases"]]
    if isinstance(fused := config.get("fused"), dict):
        config["fused"] = f"{len(fused.get('calls', ()))} calls of a file"
    return {
        "bundle": manifest.name,
        **manifest.config.get("embedding", {}),
        **config,
        "opset": manifest.opset,
        **{f"minimum ONNX Runtime, {k}": v for k, v in manifest.minimum_onnxruntime.items()},
        **{f"made by {name}": number for name, number in manifest.producers.items()},
        **{f"compiled graphs need {k}": v for k, v in manifest.compiled_for.items()},
        "proven": manifest.parity.get("passed", False),
        "graphs": graphs,
        "files": files,
    }


def _summarize_case(case: Any) -> dict[str, Any]:
    """Return the name of a case, and the largest noise of its outputs."""
    noise = case.get("noise") if isinstance(case, dict) else None
    values = noise.values() if isinstance(noise, dict) else ()
    largest = max((v for v in values if isinstance(v, (int, float))), default="-")
    return {"case": case.get("name") if isinstance(case, dict) else case, "largest noise": largest}


def _inspect_onnx(path: Path) -> dict[str, Any]:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        raise RotaryExportError(f"{path} is not an ONNX file") from None
    if not model.opset_import:
        raise RotaryExportError(f"{path} is not an ONNX file: it imports no opset")

    def describe(values: Any) -> list[str]:
        parts = []
        for value in values:
            tensor = value.type.tensor_type
            dims = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?"
                    for d in tensor.shape.dim]  # fmt: skip
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
            parts.append(f"{value.name}: {kind}({', '.join(dims)})")
        return parts

    nodes = list(list_nodes(model.graph))
    rotary = [
        {
            "node": node.name,
            "op": f"{node.domain or 'ai.onnx'}::{node.op_type}",
            "inputs": [*node.input],
            "attributes": [f"{a.name}={a.i}" for a in node.attribute],
        }
        for node in nodes
        if node.op_type in ROTARY_OPS
    ]
    bodies = [
        {
            "function": f"{f.domain}::{f.name}" + (f":{f.overload}" if f.overload else ""),
            "body": [node.op_type for node in f.node],
        }
        for f in model.functions
    ]
    return {
        "file": path.name,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "IR version": model.ir_version,
        "opsets": ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import),
        "inputs": describe(model.graph.input),
        "outputs": describe(model.graph.output),
        "nodes": len(nodes),
        "rotary nodes": len(rotary),
        **_count_fusible(path, model),
        "rotary": rotary,
        "functions": bodies,
    }


def _count_fusible(path: Path, model: Any) -> dict[str, str]:
    """Count the calls that `fuse` would replace; nothing for a file that has our node already."""
    if any(node.domain == spec.DOMAIN for node in list_nodes(model.graph)):
        return {}
    try:
        from rotary_export.fusion.fuse import fuse
        from rotary_export.fusion.result import NothingFusedError
    except ModuleNotFoundError as error:
        return {"fuse would replace": f"not known: this needs {error.name}"}
    try:
        result = fuse(path, dry_run=True)
        fused, refused = len(result.fused), len(result.why)
    except NothingFusedError as error:
        fused, refused = 0, len(error.why)
    except RotaryExportError as error:
        return {"fuse would replace": f"not known: {error}"}
    return {"fuse would replace": f"{fused} of {fused + refused} candidates"}


def examine_machine() -> tuple[dict[str, str], list[str]]:
    """Find out what this machine can run.

    Returns:
        Facts by name, and problems that keep ONNX Runtime or the op library from running.
    """
    facts = {"python": platform.python_version(), "machine": platform.machine()}
    problems = []
    facts |= dict.fromkeys(PACKAGES, "not installed") | find_versions(PACKAGES)
    flavours = find_versions(("onnxruntime", "onnxruntime-gpu"))
    if len(flavours) > 1:
        problems.append(
            f"{' and '.join(flavours)} are both installed and overwrite each other: keep one"
        )
    try:
        import onnxruntime
    except ImportError as error:
        facts["onnxruntime"] = "not installed"
        problems.append(f"ONNX Runtime does not import: {error}")
    else:
        facts |= flavours
        facts["providers"] = ", ".join(onnxruntime.get_available_providers())
        problem = find_cuda_problem()
        facts["CUDA"] = f"no: {problem}" if problem else "yes"
    try:
        facts["op library"] = str(op_library.op_library_path())
        facts["instruction set"] = op_library.instruction_set()
        facts["kernels for"] = ", ".join(op_library.library_providers())
        if "onnxruntime" in facts.get("providers", "") or flavours:
            refusal = library_refusal([CPU], "auto")
            facts["on the CPU"] = refusal or f"fused ({facts['instruction set']})"
            facts["on CUDA"] = f"function body: {library_refusal([CUDA], 'auto')}"
    except RotaryExportError as error:
        facts.setdefault("op library", "no")
        problems.append(str(error))
    forced = os.environ.get("ROTARY_EXPORT_ISA")
    if forced:
        facts["ROTARY_EXPORT_ISA"] = forced
    facts["op"] = f"{spec.DOMAIN}::{spec.OP_TYPE} version {spec.OP_VERSION}"
    return facts, problems
