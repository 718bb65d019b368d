"""The JSON of requests and answers: by orjson where it is installed, as it is with MLServer."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from rotary_export.errors import RotaryExportError
from rotary_export.types import Array

try:
    import orjson
except ImportError:
    orjson = None

# Millions of empty lists are a small body, and gigabytes of objects. Nested rows are far fewer.
MAX_PARTS = 1 << 20


def read_json(text: bytes) -> Any:
    """Read a body.

    Raises:
        RotaryExportError: It is not JSON, or has more than MAX_PARTS lists, objects and strings.
    """
    if sum(text.count(mark) for mark in (b"[", b"{", b'"')) > MAX_PARTS:
        raise RotaryExportError(
            f"the body must have at most {MAX_PARTS} lists, objects and strings in its JSON"
        )
    try:
        return json.loads(text) if orjson is None else orjson.loads(text)
    except ValueError as error:  # of JSON or of UTF-8
        raise RotaryExportError(f"the body must be JSON: {error}") from None
    except RecursionError:
        raise RotaryExportError("the body must be JSON: it is nested too deep") from None


def write_json(value: Any) -> bytes:
    """Write an answer; flat arrays are lists of numbers, in which a NaN is null."""
    if orjson is None:
        return json.dumps(value, default=_list_numbers).encode()
    return bytes(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


def _list_numbers(value: Array) -> list[Any]:
    numbers = value.tolist()
    if value.dtype.kind != "f" or not np.isnan(value).any():
        return list(numbers)
    return [None if number != number else number for number in numbers]
