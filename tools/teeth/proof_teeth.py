#!/usr/bin/env python3
"""Plant faults in models while they are traced, and see whether the proof refuses the exports.

    python tools/teeth/proof_teeth.py [--weights default|sharp|trained]... [--only TEXT] [--list]

A fault counts if it moves, in float64, an output or a rotary table by more than 10 times what the
proof allows. One that counts and is accepted is a hole in the proof: exit code 1. "sharp" weights
are the default ones x 5; the trained model is a Llama in the folder `--model`. Needs an environment
with '.[test]'. (`plant_faults.py` plants faults in the code, for the tests to catch.)
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from fault_trials import Proof, Trial
from teeth_report import COLUMNS, Row, describe, summarize, tabulate_sizes, tabulate_verdicts
from teeth_subjects import SUBJECTS, TRAINED, make_subject
from trace_faults import FAULTS, Fault

from rotary_export.cli.terminal import Terminal
from rotary_export.package import find_versions
from rotary_export.types import Progress

ROOT = Path(__file__).parents[2]


def try_fault(proof: Proof, fault: Fault, rungs: int = sys.maxsize) -> list[Trial]:
    """Plant a fault of its nominal size; if that is refused, bisect the smaller ones.

    Args:
        proof: Of the model to plant it in.
        fault: The fault.
        rungs: How many of its sizes are used.
    """
    trials = [proof.try_fault(fault, fault.nominal)]
    refused, accepted = 0, len(fault.sizes[:rungs])
    while trials[0].refusal and accepted - refused > 1:
        middle = (refused + accepted) // 2
        trials.append(proof.try_fault(fault, fault.sizes[middle]))
        if trials[-1].refusal:
            refused = middle
        else:
            accepted = middle
    return trials


def try_faults(
    faults: Sequence[Fault], weights: str, options: argparse.Namespace, progress: Progress
) -> Iterator[Row]:
    """Try faults in models of one kind of weights; each model is exported once without a fault."""
    for subject in SUBJECTS if weights != "trained" else TRAINED:
        chosen = [fault for fault in faults if fault.subject == subject]
        if not chosen:
            continue
        where = f"{weights}, {subject}"
        progress(f"{where}: without a fault")
        made = make_subject(subject, weights, options.model)
        proof = Proof(*made, (options.format,), quick=options.quick)
        for fault in chosen:
            progress(f"{where}: {fault.name}")
            row = make_row(fault, weights, try_fault(proof, fault, options.rungs))
            progress(f"{where}: {fault.name}: {describe(row)}")
            yield row


def make_row(fault: Fault, weights: str, trials: Sequence[Trial]) -> Row:
    """Describe what became of a fault, in values that JSON can express."""
    first, *others = (
        {
            "size": trial.size if fault.sizes else None,
            **{name: float(f"{value:.4g}") for name, value in asdict(trial.effect).items()},
            "counts": trial.effect.counts,
            "refused": bool(trial.refusal),
        }
        for trial in trials
    )
    refused = [trial.size for trial in trials if trial.refusal]
    return {
        "fault": fault.name,
        "kind": fault.kind,
        "model": fault.subject,
        "weights": weights,
        **first,
        "refusal": trials[0].refusal,
        "smallest": min(refused) if fault.sizes and refused else None,
        "smaller": others,
    }


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, in the order of FAULTS; those of other runs in the file stay."""
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    found = {(row["fault"], row["weights"]): row for row in (*known, *rows)}
    keys = [(fault.name, weights) for fault in FAULTS for weights in COLUMNS]
    content = {
        "versions": find_versions(("torch", "transformers", "onnxruntime")),
        "rows": [found[key] for key in keys if key in found],
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", choices=COLUMNS, action="append", help="default: all kinds")
    parser.add_argument("--only", default="", help="faults whose name contains this text")
    parser.add_argument("--list", action="store_true", help="list the faults and stop")
    parser.add_argument("--format", default="program", help="what is exported and proven")
    parser.add_argument(
        "--rungs", type=int, default=sys.maxsize, help="use only the first N sizes of a fault"
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / "build" / "real" / "smollm2",
        help="the folder of the trained model",
    )
    parser.add_argument(
        "--quick", action="store_true", help="use the quick proof; the whole one refuses no less"
    )
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    terminal = Terminal(as_json=False)
    faults = [fault for fault in FAULTS if options.only in fault.name]
    if options.list:
        lines = [(f.name, f.kind, f.subject, " ".join(f"{s:g}" for s in f.sizes)) for f in faults]
        terminal.table(("fault", "kind", "model", "sizes"), lines)
        return
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    with terminal.progress() as progress:
        for weights in options.weights or COLUMNS:
            for row in try_faults(faults, weights, options, progress):
                rows.append(row)
                if options.json:
                    write_rows(options.json, rows)
    terminal.table(*tabulate_verdicts(rows))
    if any(row["size"] for row in rows):
        terminal.table(*tabulate_sizes(rows))
    terminal.line(summarize(rows))
    sys.exit(any(row["counts"] and not row["refused"] for row in rows))


if __name__ == "__main__":
    main()
