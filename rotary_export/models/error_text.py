"""An error of torch, its exporters or a model in one line, with its place in the model."""

from __future__ import annotations

import re

_MAX_LINE = 300  # characters; some errors list every weight


def describe_error(error: BaseException) -> str:
    """Return the type and message of an error in one line, with its place in the model."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text)
    own = [frame for frame in frames if "/torch/" not in frame[0]]
    caused = re.findall(r"Caused by: \((\S+):(\d+) in (\S+)\)", text)
    location = ""
    if own or caused:
        file, line, function = (own or caused)[-1]
        location = f" (at {file.rpartition('site-packages/')[2]}:{line}, {function})"
    message = lines[0] if lines else ""
    if message.endswith(":") and len(lines) > 1:  # a title alone is of no use
        message = f"{message} {lines[1]}"
    return f"{type(error).__name__}: {message[:_MAX_LINE]}{location}"
