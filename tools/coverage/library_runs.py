"""One model of a library, exported by `export_model`, or by torch.onnx and `fuse`, and compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from library_cases.case import Case
from runs import CLOSE, describe_error, locate_error, measure_error, open_session
from torch import nn

import rotary_export
from rotary_export.bundle.manifest import Manifest
from rotary_export.compat.quiet import quiet_torch
from rotary_export.models.arguments import read_arguments
from rotary_export.models.dim_names import name_dims

OPSET = 23
Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


def prepare(case: Case) -> tuple[nn.Module | None, dict[str, Any]]:
    """Make a model and run it at each of its sizes; None, and why, where that fails."""
    try:
        row = {"version": version(case.library)}
    except PackageNotFoundError:
        return None, {"status": "not installed", "reason": f"pip install {case.library}"}
    try:
        model = case.make_model()
        for index in range(len(case.sizes)):
            run_eager(model, case.make_inputs(index))
    except Exception as error:  # whatever a library raises
        return None, row | {"status": "no model", "reason": describe_error(error)}
    return model, row | {"class": type(model).__name__}


def try_export(case: Case) -> dict[str, Any]:
    """Export a model with `export_model`; compare its ONNX file with the model.

    Returns:
        status: "equal", "WRONG", "refused", "CRASH", "no model", "not installed".
    """
    model, row = prepare(case)
    if model is None:
        return row
    eager = case.make_model()
    with tempfile.TemporaryDirectory() as folder:
        try:
            bundle = rotary_export.export_model(
                model,
                case.make_inputs(0),
                Path(folder) / "bundle",
                dynamic_shapes=case.dims,
                opset=OPSET,
                formats=("onnx",),
            )
            runs = [_open_bundle(bundle.path, use) for use in (True, False)]
        except rotary_export.RotaryExportError as error:
            return row | {"status": "refused", "reason": describe_error(error)}
        except Exception as error:  # a fault of this package, wherever it was raised
            return row | describe_crash(error)
        row |= read_findings(bundle.manifest) | compare(case, eager, runs)
        row["effect"] = measure_effect(case, bundle.path / "model.onnx", runs[0])
    return row


def try_fuse(case: Case) -> dict[str, Any]:
    """Export a model with torch.onnx, fuse the file; compare it with the model.

    Returns:
        status: as `try_export`; a file that torch.onnx can't write, or that is wrong before
        fusing and after it, is "refused", and the reason says so.
    """
    model, row = prepare(case)
    if model is None:
        return row
    eager = case.make_model()
    with tempfile.TemporaryDirectory() as folder:
        plain, fused = (Path(folder) / f"{name}.onnx" for name in ("plain", "fused"))
        try:
            export_plain(case, model, plain)
        except Exception as error:  # whatever torch's exporter raises
            reason = f"torch.onnx can't write the model: {describe_error(error)}"
            return row | {"status": "refused", "reason": reason}
        try:
            result = rotary_export.fuse(plain)
            result.save(fused)
        except rotary_export.RotaryExportError as error:
            return row | {"status": "refused", "reason": describe_error(error)}
        except Exception as error:  # a fault of this package, wherever it was raised
            return row | describe_crash(error)
        row |= {
            "calls": len(result.fused) + len(result.why),
            "fused": len(result.fused),
            "not_replaced": "; ".join(f"{found.node}: {found.reason}" for found in result.why),
        }
        row |= compare_file(case, eager, fused, (True, False))
        before = compare_file(case, eager, plain, (False,))
        row["error_before"] = before["error"]
        if row["status"] == before["status"] == "WRONG":  # `fuse` mends some that were wrong
            reason = f"the file of torch.onnx is wrong: {before['reason']}"
            return row | {"status": "refused", "reason": reason}
        row["effect"] = measure_effect(case, fused, _open_file(fused, False))
    return row


def compare_file(
    case: Case, eager: nn.Module, file: Path, libraries: Sequence[bool]
) -> dict[str, Any]:
    """Compare an ONNX file with eager, with the op library or without it."""
    try:
        return compare(case, eager, [_open_file(file, library) for library in libraries])
    except Exception as error:  # ORT's own exceptions share no base class
        return {"status": "WRONG", "error": float("inf"), "reason": describe_error(error)}


def describe_crash(error: BaseException) -> dict[str, Any]:
    return {
        "status": "CRASH",
        "reason": f"{describe_error(error)} (at {locate_error(error) or 'a library'})",
    }


def read_findings(manifest: Manifest) -> dict[str, Any]:
    """Return how many rotary calls a bundle found and fused, and the limits of its sizes."""
    found = manifest.config["rotary"]
    return {
        "calls": sum(finding["calls"] for finding in found),
        "fused": sum(finding["fused"] for finding in found),
        "layouts": sorted({f["rotation"] for f in found if f["rotation"]}),
        "not_replaced": "; ".join(f["reason"] for f in found if f["reason"]),
        "max_size": dict(manifest.graphs["model"].max_size),
    }


# ---- running


def run_eager(model: nn.Module, inputs: Mapping[str, Any]) -> list[np.ndarray]:
    """Run a model; return the tensors of its result in order."""
    with torch.no_grad():
        return list(_flatten(model(**inputs)))


def _flatten(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, torch.Tensor):
        yield value.numpy()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _flatten(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _flatten(item)


def _open_bundle(folder: Path, use_op_library: bool) -> Run:
    session = rotary_export.load(folder, "model", use_op_library=use_op_library)
    names = {info.name for info in session.graph.inputs}

    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        given = {name: value for name, value in feeds.items() if name in names}
        return [np.asarray(array) for array in session(**given).values()]

    return run


def _open_file(file: Path, library: bool) -> Run:
    session = open_session(file, library)
    names = [node.name for node in session.get_inputs()]

    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        # torch.onnx names nested inputs otherwise, but in the same order.
        given = dict(zip(names, feeds.values(), strict=True)) if set(names) - set(feeds) else feeds
        return session.run(None, {name: given[name] for name in names})

    return run


def read_feeds(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in read_arguments(inputs)[1].items()}


def compare(case: Case, eager: nn.Module, runs: Sequence[Run]) -> dict[str, Any]:
    """Compare ways to run a graph with eager at the sizes that were not traced.

    Returns:
        status: "equal" or "WRONG"; error: the largest one, relative to the largest output;
        sizes: how many were compared; limits: what the others were refused with.
    """
    errors, limits = [0.0], []
    for index in range(1, len(case.sizes)):
        inputs = case.make_inputs(index)
        want = run_eager(eager, inputs)
        for run in runs:
            try:
                got = run(read_feeds(inputs))
            except rotary_export.RotaryExportError as error:
                limits.append(f"{case.sizes[index]}: {describe_error(error)}")
                continue
            except Exception as error:  # ORT's own exceptions share no base class
                reason = f"fails at {case.sizes[index]}: {describe_error(error)}"
                return {"status": "WRONG", "error": float("inf"), "reason": reason}
            if len(got) != len(want):
                reason = f"{len(got)} outputs, eager has {len(want)}"
                return {"status": "WRONG", "error": float("inf"), "reason": reason}
            errors += [measure_error(g, w) for g, w in zip(got, want, strict=True)]
    row: dict[str, Any] = {"error": max(errors), "compared": len(errors) - 1}
    if limits:
        row["limits"] = limits
    if len(errors) == 1:
        return row | {"status": "refused", "reason": f"no size is accepted: {limits[0]}"}
    if max(errors) > CLOSE:
        return row | {"status": "WRONG", "reason": f"{max(errors):.2g} off eager"}
    return row | {"status": "equal"}


def measure_effect(case: Case, file: Path, run: Run) -> float:
    """Return how far the outputs move, at the example, when the rotary nodes do nothing.

    An error of the rotations is seen only if this is far above what is tolerated.
    """
    model = onnx.load(file)
    for node in model.graph.node:
        if node.domain != "rotary_export":
            continue
        pairs = zip((0, 4), list(node.output), strict=False)
        kept = [onnx.helper.make_node("Identity", [node.input[i]], [o]) for i, o in pairs]
        node.CopyFrom(kept[0])
        model.graph.node.extend(kept[1:])
    sorted_model = _sort(model)
    changed = file.with_name("without.onnx")
    onnx.save(sorted_model, changed)
    feeds = read_feeds(case.make_inputs(0))
    try:
        without = _open_file(changed, False)(feeds)
    except Exception:  # ORT's own exceptions share no base class
        return float("nan")
    return max(measure_error(w, g) for g, w in zip(run(feeds), without, strict=True))


def _sort(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxscript import ir

    sorted_model = ir.from_proto(model)
    sorted_model.graph.sort()
    return ir.to_proto(sorted_model)


# ---- torch.onnx


def export_plain(case: Case, model: nn.Module, file: Path) -> None:
    """Export a model as anyone calls torch.onnx, with the sizes of a case open."""
    inputs = case.make_inputs(0)
    named = name_dims(read_arguments(inputs)[1], case.dims).dims
    size = torch.export.Dim.DYNAMIC
    shapes = {
        name: {axis: size for axis, dim in enumerate(dims) if isinstance(dim, str)}
        for name, dims in named.items()
    }
    with quiet_torch(), torch.no_grad():
        torch.onnx.export(
            model,
            (),
            kwargs=inputs,
            dynamic_shapes={name: _nest(value, name, shapes) for name, value in inputs.items()},
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        ).save(file)


def _nest(value: Any, name: str, shapes: Mapping[str, dict[int, Any]]) -> Any:
    if isinstance(value, torch.Tensor):
        return shapes[name]
    if isinstance(value, (tuple, list)):
        nested = [_nest(item, f"{name}.{index}", shapes) for index, item in enumerate(value)]
        return type(value)(nested)
    return None
