"""The output of commands: tables and a spinner on a terminal, plain lines in a pipe, or JSON.

All that the commands print passes here, where it is escaped: names in files of others must not
reach a terminal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console

from rotary_export.errors import escape

Row = Sequence[object]
READABLE_COLUMNS = 80
STREAMED = "\n\t\u200c\u200d"  # line ends, tabs, and what joins letters and emoji or does not


class _Console(Console):
    """A console that is silent once its reader, for example `head`, has ended."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Terminal:
    """The output of a command.

    Args:
        as_json: Print one JSON document on standard output and nothing else.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._out = _Console(highlight=False, markup=False, emoji=False)
        self._err = _Console(stderr=True, highlight=False, markup=False, emoji=False)

    def finish(self, result: Any) -> None:
        """Print a command's result as JSON, if --json was given."""
        if self._as_json:
            self._out.out(json.dumps(result, indent=1, allow_nan=False))

    def line(self, text: str) -> None:
        """Print a human-readable line; a terminal wraps it between words."""
        if not self._as_json:
            self._out.print(escape(text), soft_wrap=not self._out.is_terminal)

    def stream(self, text: str) -> None:
        """Print a part of a text at once, its line ends and tabs included.

        It is other people's: what would move the cursor or change a colour is escaped.
        """
        if not self._as_json:
            kept = "".join(c if c in STREAMED else escape(c) for c in text)
            self._out.out(kept, end="")
            self._out.file.flush()

    def field(self, name: str, value: object, indent: str = "") -> None:
        """Print `name: value`; a long list has a line for each element."""
        values = value if isinstance(value, list) else [value]
        line = f"{indent}{name}: {', '.join(map(str, values))}"
        if len(values) > 1 and len(line) > READABLE_COLUMNS:
            self.line(f"{indent}{name}:")
            for each in values:
                self.line(f"{indent}  {each}")
        else:
            self.line(line)

    def table(self, headers: Sequence[str], rows: Sequence[Row], *, stack: bool = False) -> None:
        """Print a human-readable table, in aligned columns that are never truncated.

        A row that a terminal would wrap is printed as a block: a line for each column.

        Args:
            headers: Of the columns.
            rows: Their cells; a list is several values.
            stack: In a pipe, too, print rows of more than 80 columns as blocks.
        """
        if self._as_json:
            return
        headers = [escape(header) for header in headers]
        cells = [[_join(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
        most = self._out.width if self._out.is_terminal else READABLE_COLUMNS
        if (stack or self._out.is_terminal) and sum(widths) + 2 * (len(widths) - 1) > most:
            self._print_blocks(headers, rows)
            return
        for number, row in enumerate([list(headers), *cells]):
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self._out.out("  ".join(padded).rstrip(), style=None if number else "bold")

    def _print_blocks(self, headers: Sequence[str], rows: Sequence[Row]) -> None:
        """Print each row as its first cell and, below it, the others that are not empty."""
        for row in rows:
            for number, (header, cell) in enumerate(zip(headers, row, strict=True)):
                if cell not in ("", []):
                    self.field(header, cell, "  " if number else "")

    @contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """Show the current step on standard error: a spinner, or in a pipe a line each."""
        if not self._err.is_terminal:
            yield lambda what: self._err.print(escape(what), soft_wrap=True)
            return
        with self._err.status("starting") as status:
            yield lambda what: status.update(escape(what))


def print_line(text: str) -> None:
    """Print a line at once, as of a server that runs on."""
    click.echo(escape(text))


def print_error(message: str) -> None:
    """Print the error that ends a command."""
    click.echo(f"rotary-export: {escape(message)}", err=True)


def _join(cell: object) -> str:
    return escape(", ".join(map(str, cell)) if isinstance(cell, list) else str(cell))
