"""Reading of JSON files, of limited size and depth. Standard library only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rotary_export.bundle.paths import check_path
from rotary_export.errors import RotaryExportError

MAX_BYTES = 64 << 20
MAX_DEPTH = 64  # Python's own recursion, in JSON or in a copy, ends at about 1,000


def read_json(path: Path, *, is_finite: bool = False) -> Any:
    """Return the content of a JSON file.

    Args:
        path: The file.
        is_finite: Refuse NaN and infinity, and numbers that are too large for a float.

    Raises:
        RotaryExportError: The file does not exist, can't be read, is not valid JSON, or is larger
            or nested deeper than the limits.
    """
    check_path(path)
    read = _read_finite if is_finite else None
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RotaryExportError(f"{path} must be <= {MAX_BYTES} bytes, got {size}")
        content = json.loads(path.read_text("utf-8"), parse_float=read, parse_constant=read)
    except RotaryExportError:
        raise
    except FileNotFoundError:
        raise RotaryExportError(f"{path} does not exist") from None
    except OSError as error:
        raise RotaryExportError(f"{path} can't be read: {error.strerror or error}") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise RotaryExportError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise _describe_depth(path) from None
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [part for value in level for part in _list_parts(value)]
    if level:
        raise _describe_depth(path)
    return content


def _read_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _list_parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, list) else []


def _describe_depth(path: Path) -> RotaryExportError:
    return RotaryExportError(f"{path} must be nested at most {MAX_DEPTH} deep")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that contains an object.

    Raises:
        RotaryExportError: As `read_json`, or it contains something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        name = type(content).__name__
        raise RotaryExportError(f"{path} must contain a JSON object, got {name}")
    return content
