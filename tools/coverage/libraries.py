"""Which models of other libraries are exported: timm, diffusers, sam2, speech, proteins, ...

Each is a real class with a tiny configuration and random weights: `library_cases/`. First
`export_model` is tried. Where it refuses, the model is exported by torch.onnx as anyone calls it,
and the file is fused. Both are compared with eager at sizes that were not traced, with the op
library and without it. The exit code is 1 if a model is wrong or ends in a traceback.

    python tools/coverage/libraries.py --json tools/results/libraries.json
    python tools/coverage/libraries.py --only "Flux;Wan"

The libraries are no requirement of this project. This installs them, in an environment of one's own
that has `pip install -c tools/constraints.txt '.[test]'`:

    pip install --no-deps -r tools/coverage/libraries.txt

Each model runs in a process of its own: a crash or a hang is a line of the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from libraries_report import describe_row, summarize, write_json
from library_cases import CASES
from library_cases.case import Case
from library_runs import try_export, try_fuse
from runs import run_guarded

# A second way is of use where the first one refuses; a wrong result or a crash is to be mended.
TRY_FUSE = ("refused", "timeout")


def try_case(case: Case, seconds: float, gib: float) -> dict[str, Any]:
    """Try one model, each way in a process of its own."""
    start = time.monotonic()
    row: dict[str, Any] = {"model": case.name, "library": case.library}
    row["export"] = run_guarded(partial(try_export, case), seconds, gib)
    if row["export"]["status"] in TRY_FUSE:
        row["fuse"] = run_guarded(partial(try_fuse, case), seconds, gib)
    row["seconds"] = round(time.monotonic() - start, 1)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", help="Models, separated by semicolons; a part of the name will do."
    )
    parser.add_argument("--list", action="store_true", help="Print the models; try none.")
    parser.add_argument(
        "--json", type=Path, help="File to write; with --only, its other rows stay."
    )
    parser.add_argument(
        "--resume", action="store_true", help="Try what has no row in --json's file."
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="Seconds per model and way.")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB per model.")
    arguments = parser.parse_args()
    cases = select_cases(arguments.only)
    if arguments.list:
        for case in cases:
            print(f"{case.name} ({case.library}): {type(case).__doc__}")
        return 0
    known = {}
    if arguments.json and arguments.json.exists() and (arguments.resume or arguments.only):
        known = {row["model"]: row for row in json.loads(arguments.json.read_text())["rows"]}
    tried = []
    for index, case in enumerate(cases, 1):
        if case.name not in known or not arguments.resume:
            known[case.name] = try_case(case, arguments.timeout, arguments.memory)
        row = known[case.name]
        tried.append(row)
        print(f"{index}/{len(cases)} {describe_row(row)} [{row['seconds']} s]", flush=True)
        if arguments.json:
            write_json(arguments.json, [known[name] for name in CASES if name in known])
    found = summarize(tried)
    print(", ".join(f"{name} {value}" for name, value in found.items() if name != "libraries"))
    return 1 if found["wrong"] or found["crashed"] else 0


def select_cases(only: str | None) -> list[Case]:
    """Return the cases whose names contain one of these, or all."""
    if not only:
        return list(CASES.values())
    words = [word.strip().lower() for word in only.split(";")]
    found = [case for name, case in CASES.items() if any(w in name.lower() for w in words)]
    if not found:
        sys.exit(f"no model is called {only!r}; --list prints them")
    return found


if __name__ == "__main__":
    sys.exit(main())
