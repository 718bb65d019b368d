"""`.aoti.pt2`: a program that AOTInductor compiled for the CPU, to be run from C++."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotary_export.compat.archives import load_program
from rotary_export.compat.inductor import (
    compile_module,
    get_cache_folder,
    get_compiler,
    write_package,
)
from rotary_export.compat.quiet import quiet_loaders, quiet_torch
from rotary_export.errors import RotaryExportError, first_line
from rotary_export.runtime.compiled import COMPILED_FOR, find_refusal

_AVX2_BITS = 256


def check_compiler() -> None:
    """Refuse where a program can't be compiled and proven.

    Raises:
        RotaryExportError: There is no C++ compiler, or the machine is of another kind.
    """
    refusal = find_refusal(COMPILED_FOR)
    if refusal:
        raise RotaryExportError(f"the format 'aoti' can't be proven here: {refusal}")
    compiler = get_compiler()
    if shutil.which(compiler) is None:
        raise RotaryExportError(
            f"the format 'aoti' needs a C++ compiler, {compiler} is not installed: install g++, or "
            "name another in the environment variable CXX"
        )


def compile_program(program: Path, example: tuple[Tensor, ...], path: Path) -> None:
    """Compile a `.pt2` file.

    Args:
        program: The `.pt2` file.
        example: Inputs of the sizes that it was traced with.
        path: The `.aoti.pt2` file to write.

    Raises:
        RotaryExportError: AOTInductor or the compiler fails.
    """
    try:
        with quiet_torch(), quiet_loaders():
            module: Any = load_program(program).module()
            files = compile_module(module, example, _make_options())
            # The sources stay behind: they name places on this machine.
            write_package(path, [file for file in files if not file.endswith(".cpp")])
    except Exception as error:  # whatever AOTInductor lets through
        raise RotaryExportError(
            f"AOTInductor can't compile {program.name}: {first_line(error)}; leave 'aoti' out of "
            "formats"
        ) from error


def _make_options() -> dict[str, Any]:
    # Messages of the compiled code name the source file: of its folder and torch's, only these.
    places = {get_cache_folder(): "aoti", str(Path(torch.__file__).parent): "torch"}
    maps = [shlex.quote(f"-ffile-prefix-map={place}={name}") for place, name in places.items()]
    return {
        "aot_inductor.package": True,
        "aot_inductor.enable_line_tables": False,
        "aot_inductor.precompile_headers": False,  # cost more than two graphs take without
        "cpp.march": " ".join(("x86-64", *maps)),  # no more than simdlen adds; not "native"
        "cpp.simdlen": _AVX2_BITS,
        "cpp.enable_floating_point_contract_flag": "off",
        # What throws in a parallel region, at a bad id, ends the process.
        "cpp.threads": 1,
    }
