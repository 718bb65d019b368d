"""What `libraries.py` found, as JSON, as lines and as the tables of the page."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CORE = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "rotary_export")
WAYS = {"export": "`export_model`", "fuse": "torch.onnx, `fuse`"}
FAULTS = ("WRONG", "CRASH", "crashed")  # the last: its process ended


def classify(row: Row) -> tuple[str, str]:
    """Return the way and the outcome that count for a model.

    A fault in either way counts first. Then the first way that is equal counts, then a refusal.

    Args:
        row: With the findings of "export", and of "fuse" where it was tried.

    Returns:
        The way, "export" or "fuse", and its status.
    """
    tried = [(way, row[way]["status"]) for way in WAYS if way in row]
    for wanted in (*FAULTS, "equal"):
        for way, status in tried:
            if status == wanted:
                return way, status
    return tried[0]


def describe_row(row: Row) -> str:
    """Return the outcome of a model in one line."""
    way, status = classify(row)
    found = row[way]
    words = [f"{row['model']} ({row['library']}): {WAYS[way].replace('`', '')}: {status}"]
    if "fused" in found:
        words.append(f"{found['fused']} of {found['calls']} calls")
    if "error" in found:
        words.append(f"error {float(found['error']):.1e}, effect {float(found['effect']):.1e}")
    words += [found[key] for key in ("reason", "not_replaced") if found.get(key)]
    return ", ".join(words)


def summarize(rows: list[Row]) -> Row:
    """Count the outcomes."""
    tried = [row for row in rows if row["export"]["status"] not in ("not installed", "no model")]
    outcomes = [classify(row) for row in tried]
    return {
        "tried": len(tried),
        "not_tried": len(rows) - len(tried),
        "exported": outcomes.count(("export", "equal")),
        "fused": outcomes.count(("fuse", "equal")),
        "refused": sum(status in ("refused", "timeout") for _, status in outcomes),
        "wrong": sum(status == "WRONG" for _, status in outcomes),
        "crashed": sum(status in FAULTS[1:] for _, status in outcomes),
        "error": max((float(r[w]["error"]) for r, (w, s) in zip(tried, outcomes, strict=True)
                      if s == "equal"), default=0.0),
        "libraries": sorted({row["library"] for row in tried}),
    }  # fmt: skip


def find_versions(libraries: list[str]) -> dict[str, str]:
    """Return the installed versions of these distributions and of those under them."""
    found = {}
    for name in sorted({*CORE, *libraries}):
        for installed in (name, f"{name}-gpu"):  # onnxruntime has flavours
            try:
                found[name] = version(installed)
                break
            except PackageNotFoundError:
                continue
    return found


def write_json(file: Path, rows: list[Row]) -> None:
    summary = summarize(rows)
    found = {
        "summary": summary,
        "versions": find_versions(summary["libraries"]),
        "rows": rows,
    }
    text = json.dumps(found, indent=1).replace("Infinity", '"inf"').replace("NaN", '"nan"')
    file.write_text(text + "\n", encoding="utf-8")


# ---- the page


def describe_summary(found: Row) -> str:
    """Return in a few sentences what was found."""
    summary = found["summary"]
    ready = summary["exported"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{summary['tried']} models of {len(summary['libraries'])} libraries. `export_model` "
        f"exports {ready} ({ready / max(summary['tried'], 1):.0%}), equal to eager. `fuse` fuses "
        f"{summary['fused']} of the others. {summary['refused']} are refused, {summary['wrong']} "
        f"are wrong, {summary['crashed']} end in a traceback. The largest error is "
        f"{summary['error']:.1e}.\n\nVersions: {versions}."
    )


def tabulate(rows: list[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return headers and cells of the table of models."""
    headers = ("library", "model", "way", "outcome", "calls fused", "error", "without rotation")
    return headers, [_make_cells(row) for row in sorted(rows, key=_sort_key)]


def tabulate_refusals(rows: list[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return headers and cells of the table of what `export_model` did not export, and why."""
    others = [row for row in sorted(rows, key=_sort_key) if row["export"]["status"] != "equal"]
    cells = [
        [row["model"], *(row.get(way, {}).get("reason", "") for way in WAYS)] for row in others
    ]
    return ("model", *WAYS.values()), [[_escape(cell) for cell in line] for line in cells]


def _sort_key(row: Row) -> tuple[str, str]:
    return row["library"], row["model"]


def _make_cells(row: Row) -> list[str]:
    way, status = classify(row)
    found = row[way]
    outcome = {"equal": "equal" if way == "export" else "fused, equal"}.get(status, status)
    if found.get("limits"):
        outcome += ", some sizes refused"
    return [
        row["library"],
        row["model"],
        WAYS[way],
        outcome,
        f"{found['fused']} of {found['calls']}" if "fused" in found else "",
        f"{float(found['error']):.1e}" if "error" in found else "",
        f"{float(found['effect']):.1e}" if "effect" in found else "",
    ]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
