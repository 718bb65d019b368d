"""AOTInductor: compile a program, package what was compiled, load a package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def get_compiler() -> str:
    """Return the C++ compiler that AOTInductor calls."""
    from torch._inductor import config

    return str(config.cpp.cxx[-1])


def get_cache_folder() -> str:
    """Return the folder in which AOTInductor writes sources."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


def compile_module(module: Any, example: tuple[torch.Tensor, ...], options: Any) -> list[str]:
    """Compile the module of an exported program.

    Returns:
        The files that the compiler wrote, sources included.
    """
    files: Any = torch._inductor.aot_compile(module, example, options=options)
    return list(files)


def write_package(path: Path, files: list[Any]) -> None:
    """Write compiled files as one `.pt2` package."""
    from torch._inductor.package import package_aoti

    package_aoti(str(path), files)


def load_package(path: Path) -> Callable[..., list[torch.Tensor]]:
    """Load a package by the class that C++ programs use.

    `torch._inductor.aoti_load_package` compiles probes first, to warn of another machine.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = loader.boxed_run(list(tensors))
        return outputs

    return run
