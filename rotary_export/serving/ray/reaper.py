"""Ends what is left of Ray once its server is gone; a program of its own, beside the server.

Two of Ray's processes outlive a server that was killed, and hold its metrics port: they wait to
report to one that is dead. Where there is no /proc they are left.
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
    """Start it; it acts when its standard input closes, as it does when this process dies.

    Args:
        folder: Of Ray's session, where each of its processes has a log open.
    """
    return subprocess.Popen(
        [sys.executable, __file__, folder],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the server
    )


def main(folder: str) -> None:
    """Wait for the end of the server; kill what has a file of its session open; remove that."""
    server = os.getppid()
    sys.stdin.read()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end meanwhile, or be another user's
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
            if int(process.name) != server and any(f.startswith(f"{folder}/") for f in files):
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
