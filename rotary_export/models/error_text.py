"""An error of torch, its exporters or a model in one line, with its place in the model."""

from __future__ import annotations

import functools
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rotary_export.compat.onnx_translations import find_failing_node

_MAX_LINE = 300  # characters; some errors list every weight
_PACKAGE = str(Path(__file__).resolve().parents[1])
_STANDARD = sysconfig.get_paths()["stdlib"]
# Packages that compute for a model, but are not a model: a line of theirs does not help.
_LIBRARIES = ("torch", "onnxscript", "onnx_ir", "onnxruntime", "numpy", "sympy", "einops", "einx")
# What torch.export says of a value that it does not know while it traces.
_OF_VALUES = re.compile(
    r"data-dependent|DataDependent|\.numpy\(\) is not supported|unbacked symint|"
    r"data-dependent control flow|Cannot call numel\(\) on tensor with symbolic",
    re.IGNORECASE,
)

# What Python says of a symbolic size where a number is needed, as in a set.
_OF_SIZES = re.compile(r"\b(non-nested )?Sym(Int|Bool|Float)\b|symbolic (size|shape)")


def describe_error(error: BaseException) -> str:
    """Return the type and message of an error in one line, with its place in the model."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = lines[0] if lines else ""
    if message.endswith(":") and len(lines) > 1:  # a title alone is of no use
        message = f"{message} {lines[1]}"
    return f"{type(error).__name__}: {message[:_MAX_LINE]}{find_location(error)}"


def explain_trace_error(error: BaseException) -> str:
    """Return why torch.export can't trace a model, and a way out, as the end of a sentence."""
    text = f"{type(error).__name__} {error}"
    if not _OF_VALUES.search(text):
        reason = describe_error(error)
        if _OF_SIZES.search(text):
            reason = f"a dynamic size is no plain number{find_location(error)}"
        return (
            f"{reason}; change the model there, or give it fixed sizes with dynamic_shapes "
            "(None: all of them)"
        )
    return (
        "the model decides, or chooses a size, by the values of its tensors"
        f"{find_location(error)}; choose between results with torch.where there, or pass the value "
        "as a constant argument"
    )


def explain_onnx_error(error: BaseException) -> str:
    """Return which operator torch.onnx can't write, its line in the model, and the reason."""
    node, cause = find_failing_node(error), find_cause(error)
    if node is None:
        return describe_error(cause)
    name = str(node.target)
    if type(cause).__name__ == "DispatchError":
        is_complex = "complex-valued" in str(cause)
        return f"it has no translation of {name}{' of complex numbers' * is_complex}{locate(node)}"
    reason = describe_error(cause).removesuffix(find_location(cause))
    return f"it fails at {name}{locate(node)}: {reason}"


def find_cause(error: BaseException) -> BaseException:
    """Return the innermost error that an error was raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def find_location(error: BaseException | str) -> str:
    """Return the model's line that an error or a stack trace is from.

    Returns:
        " (at FILE:LINE, FUNCTION)", or "" if there is none.
    """
    text = str(error)
    frames = re.findall(r'File "([^"]+)", line (\d+),? in (\S+)', text)
    frames += re.findall(r"Caused by: \((/\S+):(\d+) in (\S+)\)", text)
    if isinstance(error, BaseException):
        frames = [*_list_frames(error), *frames]
    own = [frame for frame in frames if not is_library(frame[0])]
    if not own:
        return ""
    file, line, function = own[-1]
    return f" (at {shorten_path(file)}:{line}, {function})"


def _list_frames(error: BaseException) -> Iterator[tuple[str, str, str]]:
    """Yield the frames of an error that our own tracing called, outermost first."""
    frames = traceback.extract_tb(find_cause(error).__traceback__)
    starts = [n for n, frame in enumerate(frames) if is_own(frame.filename)]
    for frame in frames[starts[0] if starts else len(frames) :]:
        yield frame.filename, str(frame.lineno), frame.name


def locate(node: Any) -> str:
    """Return the model's line of a node of a traced graph, " (at FILE:LINE, FUNCTION)", or ""."""
    return find_location(node.meta.get("stack_trace") or "")


def is_own(file: str) -> bool:
    """Return whether a file is one of this package."""
    return file.startswith(_PACKAGE)


@functools.cache  # torch asks for each frame of each condition on sizes
def is_library(file: str) -> bool:
    """Return whether a line of a file is of no use to the author of a model."""
    if file.startswith("<") or is_own(file):
        return True
    _, installed, path = file.rpartition("site-packages/")
    if installed:
        return path.split("/")[0] in _LIBRARIES
    return file.startswith(_STANDARD) or any(f"/{name}/" in file for name in ("torch", "einx"))


def shorten_path(file: str) -> str:
    """Return the path of a file inside its package."""
    return file.rpartition("site-packages/")[2]


def name_model(model: object) -> str:
    """Return the name of a model's class, or of what a part of one was made from."""
    return str(getattr(model, "source_name", type(model).__name__))
