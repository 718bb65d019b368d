"""Where a bundle runs: collect what the tests of deploy's targets showed, for the pages.

python tools/targets/targets.py            run those tests, then write tools/results/targets.json
python tools/targets/targets.py --check    after a test run: does it still show all of the page?
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rotary_export.deploy.targets import TARGETS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tools" / "results" / "targets.json"
ROWS = ROOT / "build" / "targets" / "rows"  # written by tests/helpers/target_runs.py
# Of these paths, results that were equal to the bit must be so on every machine; others may differ
# with the processor.
EXACT_PATHS = ("fused", "TorchScript")
HEADERS = (
    "target", "version", "graph", "how", "path", "dtypes", "shapes", "max error", "exact", "note",
)  # fmt: skip


PATHS = {"fused": "our kernel", "portable": "the function body"}


def read_rows() -> list[dict[str, Any]]:
    """Return what the last test run showed, in a fixed order."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in ROWS.glob("*.json")]
    return sorted(rows, key=_key)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["target"], row["graph"], row["path"], *row["dtypes"])


def tabulate(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return headers and cells of the page's table."""
    return HEADERS, [
        [
            row["target"],
            row["version"],
            row["graph"],
            row["how"],
            row["path"],
            ", ".join(row["dtypes"]),
            ", ".join(row["shapes"]),
            "" if row["max_error"] is None else f"{row['max_error']:.1e}",
            "yes" if row["exact"] else "",
            row["note"],
        ]
        for row in rows
    ]


def summarize(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return headers and cells of the top page's table: one line for each target of `deploy`.

    A target's rows start with the title of its page.
    """
    headers = ("where", "target, and its page", "what runs there", "types that ran")
    lines = []
    for name in TARGETS:
        page = Path("rotary_export") / "deploy" / "kits" / name / "README.md"
        heading = (ROOT / page).read_text(encoding="utf-8").partition("\n")[0]
        title = heading.removeprefix("# ").partition(":")[0]
        ran = [row for row in rows if row["how"] == "ran" and _is_of(row, title)]
        paths = dict.fromkeys(PATHS.get(row["path"], row["path"]) for row in ran)
        dtypes = {dtype for row in ran for dtype in row["dtypes"]}
        lines.append([title, f"[`{name}`]({page})", ", ".join(paths), ", ".join(sorted(dtypes))])
    return headers, lines


def _is_of(row: dict[str, Any], title: str) -> bool:
    return row["target"].casefold().startswith(title.casefold())


def find_losses(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """Return what the table contains and the last run did not show."""
    shown = {_key(row): row for row in after}
    losses = []
    for row in before:
        name, now = " ".join(_key(row)), shown.get(_key(row))
        if now is None:
            losses.append(f"{name}: was not run")
        else:
            if now["how"] != row["how"]:
                losses.append(f"{name}: was {row['how']}, is {now['how']}")
            if row["exact"] and not now["exact"] and row["path"] in EXACT_PATHS:
                losses.append(f"{name}: is no longer equal to the bit")
    return losses


def main() -> None:
    """Run and write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run and write nothing")
    if parser.parse_args().check:
        before = json.loads(RESULTS.read_text(encoding="utf-8"))
        losses = find_losses(before, read_rows())
        for loss in losses:
            print(f"lost: {loss}")
        sys.exit(bool(losses))
    shutil.rmtree(ROWS, ignore_errors=True)
    tests = [str(ROOT / "tests" / folder) for folder in ("deploy", "serving", "real")]
    if subprocess.run([sys.executable, "-m", "pytest", *tests], check=False).returncode:
        sys.exit(1)
    RESULTS.write_text(json.dumps(read_rows(), indent=1) + "\n", encoding="utf-8")
    print(f"{RESULTS}: {len(read_rows())} rows; now tools/update_pages.py")


if __name__ == "__main__":
    main()
