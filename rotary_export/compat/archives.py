"""torch's zip archives (`.pt`, `.pt2`): what is in them, and the loader of programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def open_archive(file: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """Open an archive by the reader that torch's loaders use, and run nothing of it.

    Returns:
        The names in it, without its top folder, and what reads one of them.
    """
    reader: Any = torch._C.PyTorchFileReader(str(file))
    return list(reader.get_all_records()), reader.get_record


def load_program(file: Path) -> Any:
    """Load a torch.export program.

    `torch.export.load` reads a file that this fails on once more, as one of an older format.
    """
    from torch.export.pt2_archive._package import load_pt2

    return load_pt2(str(file)).exported_programs["model"]
