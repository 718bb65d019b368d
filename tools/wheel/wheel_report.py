"""The sections of tools/wheel/README.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], list[Sequence[str]]]


def describe(results: dict[str, Any]) -> str:
    """Return which file was built, and what it needs."""
    return (
        f"`{results['wheel']}`: its library needs glibc {results['glibc']} "
        f"and links to {', '.join(f'`{name}`' for name in results['needed'])} alone."
    )


def tabulate_tags(results: dict[str, Any]) -> Table:
    """Return one row for each package of a deployment: what its wheel requires."""
    first = results["installs"][0]
    rows = [
        (name, first["versions"][name], ", ".join(_read_platforms(tags)))
        for name, tags in first["tags"].items()
    ]
    return ("package", "version", "platform of its wheel"), rows


def _read_platforms(tags: Sequence[str]) -> list[str]:
    names = {tag.split("-")[-1] for tag in tags}
    return sorted(name for name in names if re.match(r"manylinux_\d|linux", name))


def tabulate_installs(results: dict[str, Any]) -> Table:
    """Return one row for each installation."""
    headers = ("installed", "user", "our kernel", "function body", "commands")
    return headers, [
        (
            row["what"],
            row["user"],
            row["op library"]["outcome"],
            row["function body"]["outcome"],
            ", ".join(f"`{name}`" for name in row["commands"]),
        )
        for row in results["installs"]
    ]
