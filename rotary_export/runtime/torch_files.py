"""Opens the files of torch: TorchScript, torch.export programs, compiled ones.

They are code, so that `load` and `verify` come here only where that is allowed. What can be refused
without running it is refused before torch loads a file: pickles, example inputs, a library in a
program, and whatever else no file of this package contains. What can't be refused: the functions
of a TorchScript file, the expressions of sizes in a program, which torch evaluates as Python, and
the library that a compiled one is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rotary_export.compat.quiet import quiet_loaders
from rotary_export.errors import RotaryExportError, first_line

try:
    import torch as torch  # torch_runtime has it from here: it may be missing

    from rotary_export.compat.archives import load_program, open_archive
except ImportError:
    raise RotaryExportError(
        "the runtimes 'torchscript', 'program' and 'aoti' need torch: pip install torch"
    ) from None

_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_TENSOR = r"(weight|tensor)_\d+"
_CONFIGS = r"data/(weights|constants)/model_(weights|constants)_config\.json"
_ARCHIVE = r"archive_format|archive_version|version|byteorder|\.data/(version|serialization_id)"
# The names in the files that this package writes.
_NAMES = {
    "torchscript": rf"{_ARCHIVE}|data\.pkl|constants\.pkl|(data|constants)/\d+|code/.+\.py",
    "program": (
        rf"{_ARCHIVE}|models/model\.json|data/(weights|constants)/{_TENSOR}|{_CONFIGS}"
        f"|{_SAMPLE_INPUTS}"
    ),
    "aoti": rf"{_ARCHIVE}|data/aotinductor/model/[\w.]+",
}


def open_torch_file(file: Path, kind: str) -> Any:
    """Load a file of torch, whose code may run.

    Args:
        file: The file.
        kind: Its format: "torchscript", "program" or "aoti".

    Returns:
        A scripted module, a `torch.export.ExportedProgram` or a compiled function.

    Raises:
        RotaryExportError: It contains what this package never writes, or torch can't load it.
    """
    try:
        with quiet_loaders():
            _check_archive(file, kind, *open_archive(file))
            if kind == "torchscript":
                return torch.jit.load(file)
            if kind == "program":
                return load_program(file)
            from rotary_export.compat.inductor import load_package

            return load_package(file)
    except RotaryExportError:
        raise
    except Exception as error:  # torch's loaders let through what their parsers raise
        raise RotaryExportError(
            f"torch {torch.__version__} can't load {file.name}: {first_line(error)}"
        ) from None


def _check_archive(file: Path, kind: str, names: list[str], read: Callable[[str], bytes]) -> None:
    """Refuse an archive with other parts than those that this package writes."""
    for index, name in enumerate(names):
        if not re.fullmatch(_NAMES[kind], name) or name in names[:index]:
            raise RotaryExportError(
                f"{file.name} contains {name!r}, which no file of this package has; it was not "
                "opened"
            )
        if name == _SAMPLE_INPUTS and read(name):
            raise RotaryExportError(
                f"{file.name} contains example inputs, a pickle that would run; it was not opened"
            )
        if re.fullmatch(_CONFIGS, name):
            for tensor, payload in json.loads(read(name))["config"].items():
                if payload["use_pickle"] or not re.fullmatch(_TENSOR, payload["path_name"]):
                    raise RotaryExportError(
                        f"{file.name} contains {tensor!r} as a pickle, which would run; it was not "
                        "opened"
                    )
