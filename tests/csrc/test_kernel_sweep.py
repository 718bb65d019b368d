"""kernel_sweep.cc where Python does not run: under sanitizers, and on an emulated aarch64."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.kernel_calls import instruction_sets
from helpers.paths import CSRC

SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
AARCH64_COMPILER = "aarch64-linux-gnu-g++"


def require_program(program: str, install: str) -> str:
    """Return the path of `program`; without it, skip the test, or fail it in CI."""
    path = shutil.which(program)
    if path is None:
        message = f"needs {program}: {install}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(folder: Path, *targets: str, **settings: str) -> None:
    cmake = require_program("cmake", "pip install cmake")
    options = [f"-D{key}={value}" for key, value in settings.items()]
    options += ["-DROTARY_EXPORT_KERNEL_SWEEP=ON", "-DROTARY_EXPORT_WERROR=ON"]
    run(cmake, "-S", CSRC, "-B", folder, *options)
    run(cmake, "--build", folder, "--parallel", "2", "--target", *targets)


def test_clean_under_address_and_undefined_behavior_sanitizer(tmp_path):
    build(tmp_path, "kernel_sweep", CMAKE_BUILD_TYPE="Debug", CMAKE_CXX_FLAGS=SANITIZERS)
    for isa in instruction_sets(tmp_path):
        for streaming_bytes in (0, 2**62):  # Streaming stores always, never.
            settings = {
                "ROTARY_EXPORT_ISA": isa,
                "ROTARY_EXPORT_STREAMING_BYTES": str(streaming_bytes),
            }
            out = run(tmp_path / "kernel_sweep", **settings)
            assert re.fullmatch(rf"\d{{4}} calls, instruction set {isa}\n", out)
        # As tools/soak/op_calls.py runs it.
        out = run(tmp_path / "kernel_sweep", "1", "300", ROTARY_EXPORT_ISA=isa)
        assert out == f"300 calls, instruction set {isa}\n"


def test_threads_of_a_team_have_no_data_race(tmp_path):
    build(
        tmp_path,
        "kernel_sweep",
        CMAKE_BUILD_TYPE="Debug",
        CMAKE_CXX_FLAGS="-fsanitize=thread",
        CMAKE_EXE_LINKER_FLAGS="-fsanitize=thread",
    )
    # Random addresses are off: a kernel can place memory where this sanitizer does not expect it.
    out = run("setarch", "-R", tmp_path / "kernel_sweep")
    assert re.fullmatch(r"\d{4} calls, instruction set \w+\n", out)


def test_aarch64_returns_the_same_bits(tmp_path):
    install = "apt-get install g++-aarch64-linux-gnu qemu-user"
    require_program(AARCH64_COMPILER, install)
    emulator = require_program("qemu-aarch64", install)
    objdump = require_program("aarch64-linux-gnu-objdump", install)
    build(
        tmp_path,
        "kernel_sweep",
        "rotary_export",
        CMAKE_SYSTEM_NAME="Linux",
        CMAKE_SYSTEM_PROCESSOR="aarch64",
        CMAKE_CXX_COMPILER=AARCH64_COMPILER,
        CMAKE_EXE_LINKER_FLAGS="-static",  # So that the emulator needs no libraries.
    )
    out = run(emulator, tmp_path / "kernel_sweep")
    assert re.fullmatch(r"\d{4} calls, instruction set neon\n", out)
    code = run(objdump, "-d", "--no-show-raw-insn", tmp_path / "librotary_export.so")
    assert not re.findall(r"\s(?:fml[as]|fn?m(?:add|sub))\s", code)  # No product fused with a sum.
