"""The processes of a server, as /proc has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_processes() -> dict[int, tuple[int, str]]:
    """Return (parent, title) of every process by id, but for those that are dead already."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end meanwhile
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if state != "Z":
                found[int(folder.name)] = int(parent), title
    return found


def find_family(pid: int) -> dict[int, str]:
    """Return a process and all that descend from it: titles by id."""
    processes, family = read_processes(), {pid}
    while more := {p for p, (parent, _) in processes.items() if parent in family} - family:
        family |= more
    return {p: processes[p][1] for p in family}


def find_alive(family: Mapping[int, str]) -> dict[int, str]:
    """Return those of a family that are still there."""
    processes = read_processes()
    return {p: title for p, title in family.items() if processes.get(p, (0, ""))[1] == title}


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until a condition is true; return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return value
