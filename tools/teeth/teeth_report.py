"""The tables of `proof_teeth.py`, of the rows of its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
# By kind of weights, the header of its column.
COLUMNS = {"default": "default", "sharp": "x 5", "trained": "SmolLM2"}


def describe(row: Row) -> str:
    """Return the verdict on a fault of its nominal size."""
    if row["counts"]:
        return "refused" if row["refused"] else "ACCEPTED"
    moved = max(row["outputs"], row["tables"])
    return f"no effect ({moved:.1g})" + (", refused" if row["refused"] else "")


def tabulate_verdicts(rows: Sequence[Row]) -> Table:
    """Return headers and lines: the verdicts on each fault."""
    lines = []
    for name, cells in _group(rows):
        size = next(row["size"] for row in cells if row)
        verdicts = [describe(row) if row else "" for row in cells]
        lines.append((name, f"x {size:g}" if size else "", *verdicts))
    return ("fault", "size", *COLUMNS.values()), lines


def tabulate_sizes(rows: Sequence[Row]) -> Table:
    """Return headers and lines: the smallest size that is refused of each fault that has one."""
    lines = []
    for name, cells in _group([row for row in rows if row["size"]]):
        sizes = [f"x {row['smallest']:g}" if row and row["smallest"] else "" for row in cells]
        lines.append((name, *sizes))
    return ("smallest size that is refused", *COLUMNS.values()), lines


def summarize(rows: Sequence[Row]) -> str:
    """Return how many of the faults that count are refused."""
    counting = [row for row in rows if row["counts"]]
    refused = sum(row["refused"] for row in counting)
    return f"{refused} of {len(counting)} faults that count are refused."


def _group(rows: Sequence[Row]) -> list[tuple[str, list[Row | None]]]:
    """Group rows by fault, in order; one for each kind of weights, None where it was not tried."""
    found = {(row["fault"], row["weights"]): row for row in rows}
    names = dict.fromkeys(row["fault"] for row in rows)
    return [(name, [found.get((name, weights)) for weights in COLUMNS]) for name in names]
