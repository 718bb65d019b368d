"""Ends the remaining processes of Ray after its server has ended; a program beside the server.

Two of Ray's processes outlive a server that was killed, and keep its metrics port: they wait to
report to a process that has ended. Without /proc they are not ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def start_reaper(folder: str) -> subprocess.Popen[bytes]:
    """Start it; it acts when its standard input closes, as it does when this process ends.

    Args:
        folder: Of Ray's session, in which each of its processes has an open log.
    """
    return subprocess.Popen(
        [sys.executable, __file__, folder],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the server
    )


def main(folder: str) -> None:
    """Wait for the end of the server, kill processes with open files in folder, remove it."""
    server = os.getppid()
    sys.stdin.read()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end meanwhile, or belong to another user
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
            if int(process.name) != server and any(f.startswith(f"{folder}/") for f in files):
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
