"""The built file: its symbols, what it links to, its instructions."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from wheel_files import GLIBC, find_highest_glibc, find_needed

from rotary_export.op import library as op_library

LIBRARY = op_library.op_library_path()


def require_tool(name: str) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"needs {name} (binutils)")


def run_tool(*command: str) -> str:
    require_tool(command[0])
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_only_the_c_interface_is_exported():
    exported = {
        line.split()[-1] for line in run_tool("nm", "-D", "--defined-only", LIBRARY).splitlines()
    }
    assert exported == {
        "RegisterCustomOps",
        "RotaryExportInstructionSet",
        "RotaryExportProviders",
        "RotaryExportRotate",
        "RotaryExportRotateTeam",
    }


def test_it_needs_libc_alone_and_an_old_one():
    require_tool("readelf")
    needed = find_needed(LIBRARY)
    assert [
        name for name in needed if not name.startswith(("libc.so", "libm.so", "ld-linux"))
    ] == []
    assert find_highest_glibc(LIBRARY) <= GLIBC


def test_no_product_is_fused_with_a_sum():
    # GCC's vectoriser can fuse in spite of -ffp-contract=off, so this reads the instructions.
    code = run_tool("objdump", "-d", "--no-show-raw-insn", LIBRARY)
    assert not re.findall(r"\s(?:v?fn?m(?:add|sub)\w*|fml[as]|fn?m(?:add|sub))\s", code)
