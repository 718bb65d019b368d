"""What tools/coverage/coverage.py found, as JSON and for the page."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    exported = [r for r in rows if r["status"] in ("fused", "left", "wrong")]
    rotary = [r for r in exported if r.get("fused") or r.get("left") or r.get("calls")]
    whole = [r for r in rotary if r["status"] == "fused" and r["fused"] >= r.get("calls", 0)]
    ways = [r["a"] for r in rows if "a" in r]
    a = [way["status"] for way in ways if way["status"] in ("fused", "left", "wrong")]
    return {
        "tried": len(rows),
        "no_model": sum(r["status"] == "no model" for r in rows),
        "a_exported": len(a),
        "a_all_fused": a.count("fused"),
        "a_wrong": a.count("wrong"),
        "a_limited": sum(bool(way.get("max_size")) for way in ways),
        "a_ulp": max((way["ulp"] for way in ways if "ulp" in way), default=0),
        "b_exported": len(rotary),
        "b_all_fused": len(whole),
        "b_wrong": sum(r["status"] == "wrong" for r in rows),
        "b_error": max((float(r["error"]) for r in whole), default=0),
        "b_failed_before": sum(float(r["error_before"]) == float("inf") for r in whole),
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "onnx", "onnxscript", "rotary_export")
        },
    }


def describe_summary(found: dict[str, Any]) -> str:
    """Return in a few sentences what was found."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    tried = f"{found['tried']} families tried ({found['no_model']} of them with no tiny model)."
    ours = (
        f"`export_model` exports {found['a_exported']} that apply a rotary embedding, and fuses "
        f"every call in {found['a_all_fused']} of them, {found['a_wrong']} wrongly; at most "
        f"{found['a_ulp']:.3g} ulp error of the largest output to eager. {found['a_limited']} are "
        "limited to a length, past which the model takes another branch than the graph."
    )
    theirs = (
        f"torch.onnx exports {found['b_exported']}; `fuse` fuses every call in "
        f"{found['b_all_fused']} of them, {found['b_wrong']} wrongly; at most "
        f"{found['b_error']:.1e} of the largest output from eager. Before, "
        f"{found['b_failed_before']} of these files failed at one or more of the sizes that they "
        f"were not traced at."
    )
    ways = [tried, ours, theirs] if found["a_exported"] else [tried, theirs]
    return " ".join((*ways, f"{versions}."))


def write_json(file: Path, rows: list[dict[str, Any]]) -> None:
    text = json.dumps({"summary": summarize(rows), "rows": rows}, indent=1)
    file.write_text(text.replace("Infinity", '"inf"') + "\n")


def _describe_calls(way: dict[str, Any]) -> str:
    if "fused" not in way:
        return ""
    limits = [f"{name} <= {size}" for name, size in way.get("max_size", {}).items()]
    return ", ".join((f"{way['fused']} of {way['calls']}", *limits))


def tabulate_families(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return headers and cells of the table of families."""
    headers = (
        "family", "rope type", "fused by A", "what", "fused by B", "was", "error of B", "reason",
    )  # fmt: skip
    return headers, [_describe_family(row) for row in rows]


def _describe_family(row: dict[str, Any]) -> list[str]:
    a = row.get("a", {})
    cells = (
        row["family"],
        row.get("rope_type", ""),
        _describe_calls(a),
        "; ".join(a.get("layouts", [])),
        f"{row['fused']} of {row['fused'] + row.get('left', 0)}" if "fused" in row else "",
        "; ".join(row.get("was", [])),
        f"{float(row['error']):.1e}" if "error" in row else "",
        "; ".join(
            f"{name}: {way['status']}: {way.get('reason', '')}"
            for name, way in (("A", a), ("B", row))
            if way and way["status"] != "fused"
        ),
    )
    return [str(cell).replace("|", "\\|") for cell in cells]
