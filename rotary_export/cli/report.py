"""The proof as a table, for the commands that export or verify."""

from __future__ import annotations

from typing import Any

from rotary_export.cli.terminal import Terminal


def print_report(terminal: Terminal, report: dict[str, Any]) -> None:
    """Print the proof as a table.

    Args:
        terminal: Where to print.
        report: As `Report.to_dict` returns it.
    """
    headers = (
        "graph", "output", "runtime", "kernel", "max abs", "ulp", "noise", "allowed", "exact",
        "ulp to float64", "ok",
    )  # fmt: skip
    rows = []
    for row in report["rows"]:
        eager, oracle = row["eager"], row["oracle"]
        is_model = row["oracle_allowed"] is None
        rows.append(
            (
                row["graph"],
                row["output"],
                row["runtime"],
                row["kernel_path"],
                f"{float(eager['max_abs']):.3g}",
                f"{float(eager['max_ulp']):.3g}",
                f"{row['noise']:.3g}" if is_model else "-",
                f"{row['eager_allowed']:.4g}",
                "exact" if eager["exact"] else "-",
                "-" if is_model else f"{float(oracle['max_ulp']):.2f}",
                "ok" if row["passed"] else "FAILED",
            )
        )
    terminal.table(headers, rows)
    for graph, shapes in report["shapes"].items():
        terminal.line(f"{graph} was compared at {', '.join(shapes)}")
    for runtime, why in report["skipped"].items():
        terminal.line(f"not run: {runtime}: {why}")
    for what, why in report["unverified"].items():
        terminal.line(f"not tried: {what}: {why}")
    for note in report["notes"]:
        terminal.line(f"note: {note}")
    failed = sum(not row["passed"] for row in report["rows"])
    by_oracle = [row for row in report["rows"] if row["oracle_allowed"] is not None]
    has_oracle = any(row["runtime"] != "formula" for row in by_oracle)
    reference = report["reference"] + (" and the oracle" if has_oracle else "")
    terminal.line(
        f"FAILED: {failed} of {len(rows)} comparisons are out of tolerance"
        if failed
        else f"proven: {len(rows)} comparisons with {reference}, all within tolerance"
    )
