"""What `decoders.py` found, as a sentence and as the table of the page."""

from __future__ import annotations

import re
from typing import Any

CACHES = ("full", "window", "static")
SAME = ("same", "ties")


def describe_summary(found: dict[str, Any]) -> str:
    """Return how many families generate the model's tokens, with each cache."""
    parts = []
    for cache in CACHES:
        rows = [row[cache] for row in found["rows"] if cache in row]
        tried = [row for row in rows if row["status"] != "no model"]
        if tried:
            same = sum(row["status"] in SAME for row in tried)
            ties = sum(row.get("ties", 0) for row in tried)
            tokens = sum(row.get("tokens", 0) for row in tried if row["status"] in SAME)
            parts.append(
                f"{cache}: {same} of {len(tried)} families generate the tokens of `model.generate` "
                f"({tokens:,} tokens, of which {ties} differ by a tie within the noise)"
            )
    versions = ", ".join(f"{name} {v}" for name, v in found["summary"]["versions"].items())
    return f"{'; '.join(parts)}. {versions}."


def tabulate(found: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return headers and cells: one line for each family."""
    caches = [cache for cache in CACHES if any(cache in row for row in found["rows"])]
    lines = [
        [row["family"], *(_describe(row.get(cache, {})) for cache in caches)]
        for row in found["rows"]
    ]
    return ("family", *caches), lines


def _describe(cell: dict[str, Any]) -> str:
    status = cell.get("status", "")
    if status in SAME:
        ties = f", {cell['ties']} ties" if cell.get("ties") else ""
        return f"{cell['tokens']} tokens{ties}"
    reason = cell.get("reason", "").replace("|", "/").split("\n")[0]
    kept = re.search(r"layers that keep more .*?\((\w+)\)", reason)
    short = f"its layers keep more, {kept[1]}" if kept else reason
    short = short if len(short) <= 80 else short[:77] + "..."
    return f"{status}: {short}" if short else status
