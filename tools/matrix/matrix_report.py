"""The tables of tools/matrix/README.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def tabulate_runtimes(rows: Sequence[Row]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return one row for each release, one column for each kind of bundle and kernel."""
    names = list(rows[0]["outcomes"]) if rows else []
    table = [[name, *(_shorten(row["outcomes"][name]) for row in rows)] for name in names]
    return ("bundle, kernel", *(row["onnxruntime"] for row in rows)), table


def _shorten(outcome: str) -> str:
    return outcome.split(":")[0]


def tabulate_packages(rows: Sequence[Row]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return one row for each environment."""
    headers = ("environment", "torch", "transformers", "onnx", "onnxscript", "exports", "compat")
    return headers, [
        [
            row["environment"],
            *(row["versions"].get(name, "") for name in headers[1:5]),
            "; ".join(f"{name}: {outcome}" for name, outcome in row["exports"].items()),
            row["compat"],
        ]
        for row in rows
    ]
