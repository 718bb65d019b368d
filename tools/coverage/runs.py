"""What `coverage.py` and `libraries.py` share: processes with limits, sessions, errors in words."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import rotary_export
from rotary_export.op import library as op_library

CLOSE = 2e-4  # of the largest magnitude of the outputs, float32
GIB = 2**30
_FOLDERS = re.compile(
    r"(?<![\w.)/])/(?:[\w.+-]+/)+"
)  # of this machine, or of one that built a library
_PACKAGE = str(Path(rotary_export.__file__).parent)


def run_guarded(
    function: Callable[[], dict[str, Any]], seconds: float, gib: float | None = None
) -> dict[str, Any]:
    """Call a function in a process of its own.

    Args:
        function: Returns a row of a table.
        seconds: Limit of time.
        gib: Limit of data in memory; None: none.

    Returns:
        The row; or one with the status "timeout" or "crashed", and the reason.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(function, sender, gib), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return {"status": "timeout", "reason": f"took over {seconds:g} s"}
    except EOFError:
        process.join()
        return {"status": "crashed", "reason": f"ended by {_describe_exit(process.exitcode or 0)}"}
    finally:
        process.kill()
        process.join()


def _run(function: Callable[[], dict[str, Any]], sender: Any, gib: float | None) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)  # torch's exporter prints graphs when it fails
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if gib is not None:
        size = int(gib * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    try:
        sender.send(function())
    except Exception as error:  # of the tool itself: a row of the table too
        sender.send({"status": "crashed", "reason": describe_error(error)})
        raise


def _describe_exit(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def open_session(file: Path, library: bool) -> onnxruntime.InferenceSession:
    """Open an ONNX file in ONNX Runtime, on one thread, with or without the op library."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if library:
        options.register_custom_ops_library(str(op_library.op_library_path()))
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def measure_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the largest error relative to the largest magnitude; inf: another shape, or NaN."""
    if got.shape != want.shape:
        return float("inf")
    if not want.size:
        return 0.0
    error = np.abs(got.astype(np.float64) - want.astype(np.float64)).max()
    largest = np.abs(want.astype(np.float64)).max()
    return float(error / largest if largest else error) if np.isfinite(error) else float("inf")


def describe_error(error: BaseException) -> str:
    """Return an error in one line: a sentence of ours as it is, else its innermost cause."""
    while error.__cause__ is not None and not isinstance(error, rotary_export.RotaryExportError):
        error = error.__cause__
    text = _FOLDERS.sub("", " ".join(str(error).split())) or type(error).__name__
    if isinstance(error, rotary_export.RotaryExportError):
        return text
    return f"{type(error).__name__}: {text[:300]}"


def locate_error(error: BaseException) -> str:
    """Return the innermost line of this package that an error passed through, or ''."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    if not own:
        return ""
    return f"rotary_export{own[-1].filename.removeprefix(_PACKAGE)}:{own[-1].lineno}"
