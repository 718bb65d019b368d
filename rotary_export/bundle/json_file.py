"""Reading of JSON files. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rotary_export.bundle.paths import check_path
from rotary_export.errors import RotaryExportError


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        RotaryExportError: The file does not exist, can't be read or is not valid JSON.
    """
    check_path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RotaryExportError(f"{path} does not exist") from None
    except OSError as error:
        raise RotaryExportError(f"{path} can't be read: {error.strerror or error}") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise RotaryExportError(f"{path} is not valid JSON: {error}") from None


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
