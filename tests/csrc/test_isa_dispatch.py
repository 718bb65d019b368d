"""Which instruction set isa_dispatch.cc chooses, on processors that this machine is not."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
from helpers.paths import CSRC, ROOT

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="other machines have one set"
)

AVX2 = ("avx2", "f16c")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
BF16 = (*AVX512, "avx512bf16")
SETS = {"baseline": (), "avx2": AVX2, "avx512": AVX512, "avx512bf16": BF16}


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("dispatch") / "kernel_dispatch"
    helpers = ROOT / "tests" / "helpers"
    sources = [
        CSRC / f"{name}.cc" for name in ("kernel/element_types", "kernel/isa_dispatch", "message")
    ]
    command = [
        *(os.environ.get("CXX", "c++"), "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"),
        *("-include", helpers / "kernel_dispatch_cpu.h", helpers / "kernel_dispatch.cc"),
        *(*sources, "-o", program),
    ]
    subprocess.run(command, check=True)
    return program


def choose(program: Path, features: tuple[str, ...], *sizes: int, **settings: str) -> list[str]:
    """Return the chosen set, or why there is none, and the rotation for each size in bytes."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("ROTARY_EXPORT_")}
    environment = own | {f"ROTARY_EXPORT_{k}": v for k, v in settings.items()}
    environment["FAKE_CPU"] = " ".join(features)
    command = [program, *(str(size) for size in sizes)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


@pytest.mark.parametrize("name", SETS)
def test_the_widest_supported_set_is_chosen(program, name):
    assert choose(program, SETS[name]) == [name]


@pytest.mark.parametrize("missing", BF16)
def test_a_set_needs_all_its_features(program, missing):
    features = tuple(feature for feature in BF16 if feature != missing)
    usable = [name for name, needed in SETS.items() if missing not in needed]
    assert choose(program, features) == [usable[-1]]
    for name in SETS:
        message = (
            f"ROTARY_EXPORT_ISA must be one of {', '.join(usable)} on this machine, got {name}"
        )
        assert choose(program, features, ISA=name) == [name if name in usable else message]


SMALL, LARGE = 64 * 1024, 8 * 2**20
SIZES = (0, SMALL - 4, SMALL, LARGE - 4, LARGE)


@pytest.mark.parametrize("name", SETS)
def test_small_outputs_do_without_512_bits_and_large_ones_are_streamed(program, name):
    small = "avx2" if "512" in name else name
    assert choose(program, SETS[name], *SIZES)[1:] == [
        f"{small} plain",
        f"{small} plain",
        f"{name} plain",
        f"{name} plain",
        f"{name} streaming",
    ]


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_named_is_used_for_all_sizes(program, name):
    lines = choose(program, BF16, *SIZES, ISA=name, STREAMING_BYTES="65536")
    assert lines[1:] == [*[f"{name} plain"] * 2, *[f"{name} streaming"] * 3]


def test_an_empty_variable_is_unset(program):
    assert choose(program, AVX512, ISA="") == ["avx512"]
