"""The table of `kills.py`."""

from __future__ import annotations

from typing import Any


def tabulate(results: dict[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Return the table of the results: headers and rows."""
    names = ("random", "placed", "new", "restored", "lost", "mixed", "rubbish")
    headers = ["what is killed", "at random", "placed", "new one there", *names[3:]]
    rows = [[row["what"], *(row[name] for name in names)] for row in results["rows"]]
    total = ["all", *(sum(row[name] for row in results["rows"]) for name in names)]
    return headers, [*rows, total]
