#!/usr/bin/env python
"""Measure the proof, and the text that bundles generate, with trained weights.

Each model of tools/real/fetch_models.py is exported as ONNX in float32 and float16, with a
key/value cache and without. Then it continues three texts, with the op library and without it.

    python tools/real/measure_real.py --json tools/results/real_weights.json
    python tools/real/measure_real.py --only smollm2 --seeds 20

Each export runs in a process of its own, whose peak memory is measured. Rows of models that are not
measured stay in the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import fetch_models
import torch
from greedy import find_differences, generate_eager, load_model, make_text_example

import rotary_export
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.measure.machine import describe_machine
from rotary_export.models.convert import convert_model
from rotary_export.proof.report import Report

DTYPES = ("float32", "float16")
KERNELS = {"op library": {}, "function body": {"use_op_library": False}}
PROOF_BEGINS = "run the model itself"  # the step of export_model's progress
KEY = ("model", "dtype", "cache")


def measure(name: str, dtype: str, cache: bool, tokens: int, seeds: int) -> dict[str, Any]:
    """Export one model and generate text with it; return a row of the results."""
    row: dict[str, Any] = dict(zip(KEY, (name, dtype, cache), strict=True))
    model, tokenizer = load_model(fetch_models.fetch(name))
    example = make_text_example(model, tokenizer, cache)
    model, example = convert_model(model, example, getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        steps: list[tuple[float, str]] = []
        started = time.perf_counter()
        try:
            bundle = rotary_export.export_model(
                model,
                example,
                Path(folder) / name,
                formats=["onnx"],
                progress=lambda step: steps.append((time.perf_counter(), step)),
            )
            row |= {"refusal": ""} | describe_report(bundle.report)
            row["fused"] = sum(found["fused"] for found in bundle.manifest.config["rotary"])
            row["calls"] = sum(found["calls"] for found in bundle.manifest.config["rotary"])
        except RotaryExportError as error:
            bundle, row["refusal"] = None, str(error)
        ended = time.perf_counter()
        proof = next((moment for moment, step in steps if step.startswith(PROOF_BEGINS)), ended)
        row["export_seconds"], row["proof_seconds"] = round(proof - started), round(ended - proof)
        row["long_seconds"] = round(measure_long(steps))
        row["peak_gib"] = read_peak_memory()
        if bundle is not None:
            row |= compare_texts(model, tokenizer, bundle, tokens)
            row |= draw_again(model, example, bundle, seeds)
    return row


def measure_long(steps: Sequence[tuple[float, str]]) -> float:
    """Return how long the model itself took for the cases of 500 tokens and more."""
    pairs = itertools.pairwise(steps)
    return sum(
        following - moment
        for (moment, step), (following, _) in pairs
        if step.startswith(PROOF_BEGINS) and re.search(r"seq_len \d{3,}", step)
    )


def describe_report(report: Report) -> dict[str, Any]:
    """Return the lines whose error is the largest share of the limit: of all, and of the logits."""
    found: dict[str, Any] = {"unverified": report.unverified}
    logits = [row for row in report.rows if row.output == "logits"]
    for name, rows in (("worst", report.rows), ("logits", logits)):
        row = max(rows, key=lambda row: row.eager_share)
        found[name] = {
            "output": row.output,
            "runtime": row.runtime,
            "case": row.case,
            "error_ulp": round(row.eager.max_ulp, 2),
            "noise_ulp": round(row.noise, 2),
            "share": round(row.eager_share, 3),
        }
    return found


def compare_texts(
    model: Any, tokenizer: Any, bundle: rotary_export.Bundle, count: int
) -> dict[str, Any]:
    """Compare the tokens that a bundle chooses with those of `model.generate`."""
    want = generate_eager(model, tokenizer, count)
    found = {}
    for kernel, options in KERNELS.items():
        session = rotary_export.load(bundle.path, "model", **options)
        differences = find_differences(model, session, want)
        found[kernel] = [asdict(d) | {"explained": d.explained} for d in differences]
    texts = [tokenizer.decode(t[k]) for t, k in zip(want.tokens, want.keep, strict=True)]
    return {"tokens": int(want.keep.sum()), "texts": texts, "differences": found}


def draw_again(
    model: Any, example: Mapping[str, Any], bundle: rotary_export.Bundle, seeds: int
) -> dict[str, Any]:
    """Prove a bundle again with other inputs, and count how often it would be refused."""
    draws, refused = [], 0
    for seed in range(1, seeds + 1):
        try:
            report = rotary_export.verify_model(bundle.path, model, example, seed=seed, quick=True)
            draws.append(describe_report(report))
            refused += not report.passed
        except CheckFailedError as error:  # no case that can be compared
            draws.append({"refusal": str(error)})
            refused += 1
    return {"draws": draws, "refused_draws": refused}


def read_peak_memory() -> float:
    """Return the largest memory that this process has had, in GiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return round(int(kib) / 2**20, 2)


# ---- the table of tools/real/README.md


def tabulate(found: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[object]]]:
    """Return the headers and the rows of the page."""
    headers = (
        "model",
        "dtype",
        "cache",
        "exported",
        "logits: error, noise, in ulp",
        "largest share of a limit",
        "export, s",
        "proof, s",
        "peak, GiB",
        "tokens that differ: op library, function body",
        "draws refused",
    )
    return headers, [_format_row(row) for row in found["rows"]]


def _format_row(row: Mapping[str, Any]) -> list[object]:
    first = [fetch_models.MODELS[row["model"]].title, row["dtype"], "yes" if row["cache"] else "no"]
    costs = [row[name] for name in ("export_seconds", "proof_seconds", "peak_gib")]
    if row["refusal"]:
        return [*first, f"refused: {row['refusal']}", "", "", *costs, "", ""]
    counts = [_count_differences(row["differences"][kernel]) for kernel in KERNELS]
    draws = f"{row['refused_draws']} of {len(row['draws'])}" if row["draws"] else ""
    fused = f"{row['fused']} of {row['calls']} calls fused"
    return [
        *first,
        fused,
        f"{row['logits']['error_ulp']:.3g}, {row['logits']['noise_ulp']:.3g}",
        f"{row['worst']['share']:.0%} ({row['worst']['output']})",
        *costs,
        f"{', '.join(counts)} of {row['tokens']}",
        draws,
    ]


def _count_differences(differences: Sequence[Mapping[str, Any]]) -> str:
    unexplained = sum(not found["explained"] for found in differences)
    return f"{len(differences)}" + (f" ({unexplained} not by noise)" if unexplained else "")


def tabulate_differences(
    found: Mapping[str, Any],
) -> tuple[Sequence[str], list[Sequence[object]]]:
    """Return one row for each token that differs."""
    headers = ("model", "dtype", "cache", "kernel", "prompt, token", "gap", "noise", "gap < noise")
    rows: list[Sequence[object]] = [
        (
            *_format_row(row)[:3],
            kernel,
            f"{one['prompt']}, {one['token']}",
            f"{one['gap']:.2g}",
            f"{one['noise']:.2g}",
            "yes" if one["explained"] else "no",
        )
        for row in found["rows"]
        for kernel, differences in row.get("differences", {}).items()
        for one in differences
    ]
    return headers, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=fetch_models.MODELS, help="one of the models")
    parser.add_argument("--tokens", type=int, default=40, help="generated after each prompt")
    parser.add_argument("--seeds", type=int, default=0, help="more proofs, with other inputs")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    rows: dict[tuple[object, ...], dict[str, Any]] = {}
    if options.json and options.json.exists():
        known = json.loads(options.json.read_text(encoding="utf-8"))["rows"]
        rows = {tuple(row[name] for name in KEY): row for row in known}
    names = [options.only] if options.only else list(fetch_models.MODELS)
    wanted = [(name, dtype, cache) for name in names for dtype in DTYPES for cache in (False, True)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for key in wanted:
            row = pool.submit(partial(measure, *key, options.tokens, options.seeds)).result()
            rows[key] = row
            print(json.dumps(row), flush=True)
            if options.json:
                found = {"machine": describe_machine(), "rows": list(rows.values())}
                text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
                options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
