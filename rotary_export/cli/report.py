"""The proof as a table, and the tokens of a decoder as text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rotary_export.bundle.dims import is_present
from rotary_export.cli.terminal import Terminal
from rotary_export.runtime.decoder.text import Text
from rotary_export.types import Array


def print_report(terminal: Terminal, report: dict[str, Any]) -> None:
    """Print the proof as a table of each graph.

    Args:
        terminal: Where to print.
        report: As `Report.to_dict` returns it.
    """
    for graph in dict.fromkeys(row["graph"] for row in report["rows"]):
        _print_graph(terminal, graph, [row for row in report["rows"] if row["graph"] == graph])
    for graph, shapes in report["shapes"].items():
        terminal.line(f"{graph} was compared at {', '.join(shapes)}")
    generated = report.get("generated", [])
    for each in generated:
        terminal.line(f"generated, {_describe_tokens(each)}")
    for runtime, why in report["skipped"].items():
        terminal.line(f"not run: {runtime}: {why}")
    for what, why in report["unverified"].items():
        terminal.line(f"not tried: {what}: {why}")
    for note in report["notes"]:
        terminal.line(f"note: {note}")
    failed = sum(not row["passed"] for row in (*report["rows"], *generated))
    by_oracle = [row for row in report["rows"] if row["oracle_allowed"] is not None]
    has_oracle = any(row["runtime"] != "formula" for row in by_oracle)
    reference = report["reference"] + (" and the oracle" if has_oracle else "")
    count = len(report["rows"]) + len(generated)
    terminal.line(
        f"FAILED: {failed} of {count} comparisons are out of tolerance"
        if failed
        else f"proven: {count} comparisons with {reference}, all within tolerance"
    )


def _describe_tokens(generated: Mapping[str, Any]) -> str:
    """Return how many tokens differ from the model's own, and how many of these are ties."""
    differences = generated["differences"]
    ties = sum(found["is_tie"] for found in differences)
    tie = f", {ties} by a tie within the noise" if ties else ""
    return (
        f"{generated['way']}: {len(differences)} of {generated['tokens']} tokens differ from the "
        f"model's own{tie}"
    )


def _print_graph(terminal: Terminal, graph: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of one graph, and what computed its rotary nodes.

    The grown cache of a decoder is a single row for each runtime, but for what failed of it.
    """
    of_model = any(row["oracle_allowed"] is None for row in rows)
    headers = ("output", "runtime", "ulp", "allowed", "noise" if of_model else "to float64", "ok")
    terminal.line(f"{graph}, error in ulp:")
    cells = []
    for row in _group_presents(rows):
        eager, is_model = row["eager"], row["oracle_allowed"] is None
        other = f"{row['noise']:.3g}" if is_model else f"{float(row['oracle']['max_ulp']):.2f}"
        cells.append(
            (
                row["output"],
                row["runtime"],
                "exact" if eager["exact"] else f"{float(eager['max_ulp']):.3g}",
                f"{row['eager_allowed']:.4g}",
                other if is_model == of_model else "-",
                "ok" if row["passed"] else "FAILED",
            )
        )
    terminal.table(headers, cells)
    kernels: dict[str, list[str]] = {}
    for row in rows:
        names = kernels.setdefault(row["kernel_path"], [])
        if row["runtime"] not in (*names, row["kernel_path"]):
            names.append(row["runtime"])
    for kernel, names in kernels.items():
        if kernel and names:
            terminal.line(f"kernel {kernel}: {'; '.join(names)}")


def _group_presents(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Replace rows of a grown cache that passed by the worst one of each run."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for index, row in enumerate(rows):
        is_grouped = row["passed"] and is_present(row["output"])
        key = (row["runtime"], row["kernel_path"]) if is_grouped else (str(index),)
        found.setdefault(key, []).append(row)
    return [_pick_worst(group) if len(group) > 1 else group[0] for group in found.values()]


def _pick_worst(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the row whose error is the largest share of what is allowed, named for all."""
    worst = max(rows, key=_measure_share)
    return {**worst, "output": f"present.* (worst of {len(rows)})"}


def _measure_share(row: Mapping[str, Any]) -> float:
    """Return how much of its allowed error an output has."""
    allowed = float(row["eager_allowed"])
    return float(row["eager"]["max_ulp"]) / allowed if allowed else 0.0


def print_tokens(
    terminal: Terminal,
    columns: Iterable[Array],
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    text: Text | None,
) -> tuple[list[list[int]], list[str]]:
    """Print tokens as they are generated: text, or ids where there is no tokenizer.

    Several rows are printed one after the other, once they are complete.

    Args:
        terminal: Where to print.
        columns: The new tokens of all rows, (B,), one after the other.
        prompts: The ids of each row.
        ends: Tokens that end a row.
        text: The tokenizer.

    Returns:
        The ids of each row, its prompt and its new tokens up to the end; and the new text.
    """
    rows = [[*prompt] for prompt in prompts]
    is_open = [True] * len(rows)
    streams = [text.decode_after(prompt) if text else None for prompt in prompts]
    parts: list[list[str]] = [[] for _ in rows]
    for column in columns:
        for index, token in enumerate(column.tolist()):
            if not is_open[index]:
                continue
            is_open[index] = token not in ends
            rows[index].append(token)
            decode = streams[index]
            separator = "," if len(rows[index]) > len(prompts[index]) + 1 else ""
            part = decode(token) if decode else f"{separator}{token}"
            if len(rows) == 1:
                terminal.stream(part)
            parts[index].append(part)
    for index, each in enumerate(parts if len(rows) > 1 else ()):
        terminal.line(f"prompt {index + 1}:")
        terminal.stream("".join(each))
        terminal.stream("\n")
    if len(rows) == 1:
        terminal.stream("\n")
    return rows, ["".join(each) for each in parts]
