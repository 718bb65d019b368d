"""Run a model, as it was and fused: in ONNX Runtime, and in onnx.reference where that can't.

One session is open at a time, with large weights mapped from a file: memory never contains more
than two copies of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from rotary_export.fusion.check.feeds import Shape
from rotary_export.op import library as op_library
from rotary_export.op.onnx_reference import RotaryEmbedding as ReferenceRotaryEmbedding
from rotary_export.runtime.providers import CPU, import_onnxruntime
from rotary_export.runtime.ways import FUNCTION_BODY, OP_LIBRARY, Way
from rotary_export.types import Array

# How a model ran before: with the whole batch, one row at a time where it can't run a batch, or in
# onnx.reference where ONNX Runtime can't run it.
AS_IT_IS, ROW_BY_ROW, BY_REFERENCE = "as it is", "row by row", "by onnx.reference"

Outputs = dict[str, Array]
Run = Outputs | str  # or why it did not run


def find_ways(skipped: list[str]) -> list[Way]:
    """List the ways that run a fused model.

    Args:
        skipped: Those that are not available are added, with the reason.
    """
    ways = []
    for way in (FUNCTION_BODY, OP_LIBRARY):
        refusal = way.find_refusal()
        if refusal and way is OP_LIBRARY:
            skipped.append(f"{way.name}: {refusal}")
        else:
            ways.append(way)  # without ONNX Runtime, the first run reports what is missing
    return ways


def _open(model: onnx.ModelProto, folder: Path | None, library: bool) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # a copy of the weights
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    if library:
        options.register_custom_ops_library(str(op_library.op_library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])


def run_fused(
    model: onnx.ModelProto,
    folder: Path | None,
    cases: Sequence[Mapping[str, Array]],
    shapes: Sequence[Shape],
    run_modes: Sequence[str],
    library: bool,
) -> list[Run]:
    """Run the fused model; row by row where neither it nor the model before runs the batch."""
    try:
        session = _open(model, folder, library)
    except Exception as error:  # ORT's own exceptions share no base class
        return [_describe(error)] * len(cases)
    runs = []
    for case, shape, run_mode in zip(cases, shapes, run_modes, strict=True):
        run = _run_case(session, case)
        if isinstance(run, str) and run_mode == ROW_BY_ROW:
            run = _run_rows(session, case, shape.batch) or run
        runs.append(run)
    return runs


def _run_case(session: Any, case: Mapping[str, Array]) -> Run:
    names = [value.name for value in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(case)), strict=True))
    except Exception as error:  # ORT's own exceptions share no base class
        return _describe(error)


def _describe(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def run_before(
    model: onnx.ModelProto,
    folder: Path | None,
    cases: Sequence[Mapping[str, Array]],
    shapes: Sequence[Shape],
    skipped: list[str],
) -> tuple[list[Run], list[str]]:
    """Run the model as it was; a batch that it can't run, one row at a time."""
    try:
        session = _open(model, folder, library=False)
    except Exception as error:  # ORT's own exceptions share no base class
        return [_describe(error)] * len(cases), [""] * len(cases)
    runs, run_modes = [], []
    for case, shape in zip(cases, shapes, strict=True):
        run, run_mode = _run_case(session, case), AS_IT_IS
        if isinstance(run, str) and shape.batch > 1:
            rows = _run_rows(session, case, shape.batch)
            if rows is not None:
                run, run_mode = rows, ROW_BY_ROW
        if isinstance(run, str):
            skipped.append(
                f"batch {shape.batch}, length {shape.length}, past {shape.past}: the model does "
                f"not run there before: {run}"
            )
        runs.append(run)
        run_modes.append(run_mode)
    return runs, run_modes


def _run_rows(session: Any, case: Mapping[str, Array], batch: int) -> Outputs | None:
    parts = []
    for row in range(batch):
        cut = {
            name: value[row : row + 1] if value.ndim and value.shape[0] == batch else value
            for name, value in case.items()
        }
        run = _run_case(session, cut)
        if isinstance(run, str):
            return None
        parts.append(run)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def run_reference(model: onnx.ModelProto, cases: Sequence[Mapping[str, Array]]) -> list[Run]:
    """Run a model in onnx.reference, before or after."""
    from rotary_export.compat.onnx_evaluator import WideEvaluator

    names = [value.name for value in model.graph.output]
    try:
        evaluator = WideEvaluator(model, new_ops=[ReferenceRotaryEmbedding])
        results: list[Any] = [evaluator.run(None, dict(case)) for case in cases]
    except Exception as error:  # whatever its operators raise
        return [_describe(error)] * len(cases)
    return [dict(zip(names, result, strict=True)) for result in results]
