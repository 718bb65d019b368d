"""Which decoders generate the tokens of `model.generate`: every causal model with a rotary part.

Each family gets the tiny random model of `coverage.py`. It is exported with its cache (`quick`).
32 greedy tokens of `load_decoder` are compared with the model's own, in the four ways of the proof.

    python tools/coverage/decoders.py --json tools/results/decoders.json --resume
    python tools/coverage/decoders.py --only llama,gemma2 --caches full,window,static

Each export runs in a process of its own: a crash or a hang is a line of the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import transformers
from coverage import build, discover
from runs import describe_error, run_guarded

import rotary_export
from rotary_export.models.decoder.generate import compare_generated
from rotary_export.models.prove.prove import RejectedError
from rotary_export.models.trace.snapshot import Snapshot

SLOTS = 64  # of a static cache
CACHES = ("full", "window", "static")


def list_families() -> list[str]:
    """Return the families of `coverage.py` that are causal language models."""
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return [family for family in discover() if family.partition("+")[0] in causal]


def try_family(family: str, cache: str) -> dict[str, Any]:
    """Export one family with a cache and compare its tokens.

    Args:
        family: A model type, or one of VARIANTS.
        cache: One of CACHES.

    Returns:
        status: "same" (no token differs), "ties" (only by a tie within the noise), "differs",
        "not compared", "refused" (of the cache), "no model".
    """
    try:
        model = build(family)[0].model
    except Exception as error:  # whatever a family's code raises
        return {"status": "no model", "reason": describe_error(error)}
    slots = {"max_cache_len": SLOTS} if cache == "static" else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            bundle = rotary_export.export_model(
                model, None, Path(folder) / "b", formats=["onnx"], quick=True, cache=cache, **slots
            )
        except RejectedError as error:
            return {"status": "differs", "reason": describe_error(error)}
        except rotary_export.RotaryExportError as error:
            return {"status": "refused", "reason": describe_error(error)}
        found, left_out = compare_generated(
            model, bundle.path, bundle.manifest, None, Snapshot(model), False, 0, lambda _: None
        )
    if not found:
        return {"status": "not compared", "reason": "; ".join(left_out.values())}
    differences = [each for way in found for each in way.differences]
    is_tie = all(each.is_tie for each in differences)
    return {
        "status": "same" if not differences else "ties" if is_tie else "differs",
        "tokens": sum(way.tokens for way in found),
        "ties": sum(each.is_tie for each in differences),
        "reason": "; ".join(each.describe() for each in differences),
    }


def write_json(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, and how many have which status."""
    names = ("torch", "transformers", "onnx", "rotary_export")
    summary = {
        "families": len(rows),
        **{c: Counter(row[c]["status"] for row in rows if c in row) for c in CACHES},
        "versions": {name: version(name) for name in names}
        | {"onnxruntime": onnxruntime.__version__},
    }
    file.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Try families, and write what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="Families, separated by commas.")
    parser.add_argument("--caches", default="full,static", help="Of: full,window,static.")
    parser.add_argument("--json", type=Path, help="File to write.")
    parser.add_argument("--resume", action="store_true", help="Keep the lines of --json's file.")
    parser.add_argument("--timeout", type=float, default=300.0, help="Seconds per export.")
    asked = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if asked.resume and asked.json.exists():
        rows = {row["family"]: row for row in json.loads(asked.json.read_text())["rows"]}
    for family in asked.only.split(",") if asked.only else list_families():
        row = rows.setdefault(family, {"family": family})
        for cache in asked.caches.split(","):
            if cache in row:
                continue
            row[cache] = found = run_guarded(partial(try_family, family, cache), asked.timeout)
            reason = found.get("reason", "")[:160]
            print(f"{family} {cache}: {found['status']} {reason}", file=sys.stderr, flush=True)
            if asked.json:
                write_json(asked.json, [*rows.values()])


if __name__ == "__main__":
    main()
