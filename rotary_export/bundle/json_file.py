"""Reading of JSON files. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rotary_export.errors import RotaryExportError


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        RotaryExportError: The file does not exist, can't be read or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RotaryExportError(f"{path} does not exist") from None
    except OSError as error:
        raise RotaryExportError(f"{path} can't be read: {error.strerror or error}") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise RotaryExportError(f"{path} is not valid JSON: {error}") from None
