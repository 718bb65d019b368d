"""The performance section of the bench page, made from what tools/bench/bench.py wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "bench.json"
LAYOUTS = ("half", "interleaved")
OPS = {
    "rotary_export": "this op",
    "com.microsoft": "`com.microsoft` op",
    "ai.onnx": "`ai.onnx` op",
    "primitives": "primitives",
}

Table = tuple[Sequence[str], Iterable[Sequence[object]]]


def read_results() -> dict[str, Any]:
    """Return what was committed."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def describe_conditions(found: dict[str, Any]) -> str:
    """Return what the numbers were measured on, and how far they can be trusted."""
    machine = found["machine"]
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    noise = " and ".join(f"{value:.0%} ({name})" for name, value in found["noise"].items())
    trust = f"identical calls differed by {noise}"
    if found["warnings"]:
        trust = f"{trust}; **{'; '.join(found['warnings'])}**"
    return (
        f"Measured on {machine['processor']}, {machine['cores']} cores, caches {caches}, kernel "
        f"`{machine['instruction set']}`, {versions}; {trust}."
    )


def tabulate_shares(found: dict[str, Any]) -> Table:
    """Return rope's share of a decoder layer, one line per model and phase."""
    lines: dict[str, dict[str, str]] = {}
    for share in found["shares"]:
        line = lines.setdefault(f"{share['model']}, {share['phase']}", {})
        line[share["op"]] = f"{share['share']:.2%}"
    rows = ([phase, *(line[op] for op in OPS)] for phase, line in lines.items())
    return ("rope's share of a decoder layer", *OPS.values()), rows


def tabulate_ratios(found: dict[str, Any]) -> Table:
    """Return the ratios of which something is asked, the layouts beside each other.

    "A copy": the same ratio if a plain copy took the op's place.
    """
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for result in found["results"]:
        if not result["asked"]:
            continue
        words = result["case"].split()
        layout = next((word for word in words if word in LAYOUTS), LAYOUTS[0])
        case = " ".join(word for word in words if word not in LAYOUTS)
        ratio = result["ratio of"].partition(", of ")[0]
        for op in ("com.microsoft", "ai.onnx"):
            ratio = ratio.replace(op, "ORT's faster op")
        cell = f"{result['median']:.3g} ({result['min']:.3g} to {result['max']:.3g})"
        if result["of a copy"]:
            cell += f", a copy {result['of a copy']:.3g}"
        lines.setdefault((case, ratio), {})[layout] = cell
    rows = ([*key, *(line.get(name, "") for name in LAYOUTS)] for key, line in lines.items())
    headers = [f"{layout}: median (min to max)" for layout in LAYOUTS]
    return ("case", "ratio", *headers), rows
