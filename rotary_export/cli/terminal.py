"""The output of commands: tables and a spinner on a terminal, plain lines in a pipe, or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Sequence[object]


class Terminal:
    """The output of a command.

    Args:
        as_json: Print one JSON document on standard output and nothing else.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)

    def finish(self, result: Any) -> None:
        """Print a command's result as JSON, if --json was given."""
        if self._as_json:
            print(json.dumps(result, indent=1, allow_nan=False))

    def line(self, text: str) -> None:
        """Print a human-readable line."""
        if not self._as_json:
            self._out.print(text, markup=False)

    def table(self, headers: Sequence[str], rows: Sequence[Row]) -> None:
        """Print a human-readable table; in a pipe, aligned columns that are never truncated."""
        if self._as_json:
            return
        cells = [[str(cell) for cell in row] for row in rows]
        if self._out.is_terminal:
            table = Table(*headers, header_style="bold")
            for row in cells:
                table.add_row(*row)
            self._out.print(table)
            return
        widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
        for row in [list(headers), *cells]:
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(padded).rstrip())

    @contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """Show the current step on standard error: a spinner, or in a pipe a line each."""
        if not self._err.is_terminal:
            yield lambda what: self._err.print(what, markup=False)
            return
        with self._err.status("starting") as status:
            yield status.update
