"""The commands that print facts: `inspect` and `doctor`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from rotary_export.cli.options import PathType, json_option
from rotary_export.cli.terminal import Terminal


@click.command()
@click.argument("path", type=PathType())
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Print the contents of PATH, a bundle or an .onnx file."""
    from rotary_export.cli.inspection import inspect_path

    terminal = Terminal(as_json)
    found = inspect_path(path)
    tables = {
        name: value
        for name, value in found.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    for name, value in found.items():
        if name not in tables and value != []:
            terminal.field(name, value)
    for name, rows in tables.items():
        headers = list(dict.fromkeys(key for row in rows for key in row))
        terminal.line("")
        terminal.line(name)
        cells = [[row.get(key, "-") for key in headers] for row in rows]
        terminal.table(headers, cells, stack=True)
    terminal.finish(found)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Print what this machine can run, and why CUDA or the op library is not available."""
    from rotary_export.cli.inspection import examine_machine

    terminal = Terminal(as_json)
    facts, problems = examine_machine()
    for name, fact in facts.items():
        terminal.field(name, fact)
    for problem in problems:
        terminal.line(f"problem: {problem}")
    terminal.finish({"facts": facts, "problems": problems})
    if problems:
        sys.exit(1)
