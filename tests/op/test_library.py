"""The op library as a file: found, loaded, and choosing its instruction set at load time."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.cases import make_inputs
from helpers.op_library import check_against_eager, random_float32_cases, run_session

from rotary_export.errors import RotaryExportError
from rotary_export.op import library as op_library
from rotary_export.op import spec

LIBRARY = op_library.op_library_path()


@pytest.fixture
def load_copy(tmp_path, monkeypatch):
    """Return a function that copies the library and sets the ROTARY_EXPORT_ISA that it reads."""

    def load(isa: str) -> str:
        monkeypatch.setenv("ROTARY_EXPORT_ISA", isa)
        folder = tmp_path / f"isa-{isa}"  # a path of its own, so that it is loaded anew
        folder.mkdir()
        monkeypatch.setattr(op_library, "package_folders", lambda: [folder])
        return shutil.copy(LIBRARY, folder)

    return load


def instruction_sets_of_this_machine(load_copy) -> list[str]:
    load_copy("none")
    with pytest.raises(RotaryExportError, match="ROTARY_EXPORT_ISA must be one of") as raised:
        op_library.instruction_set()
    return str(raised.value).split("one of ")[1].split(" on this machine")[0].split(", ")


def test_every_instruction_set_returns_the_same_bits(load_copy):
    names = instruction_sets_of_this_machine(load_copy)
    assert names[0] in {"baseline", "neon"}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "avx512vl" in cpuinfo.read_text():
        bfloat16 = ["avx512bf16"] if "avx512_bf16" in cpuinfo.read_text() else []
        assert names == ["baseline", "avx2", "avx512", *bfloat16]
    for name in names:
        library = load_copy(name)
        assert op_library.instruction_set() == name
        for inputs, interleaved, rotary_dim in random_float32_cases(30, seed=13):
            check_against_eager(
                inputs,
                name,
                library=library,
                interleaved=interleaved,
                rotary_embedding_dim=rotary_dim,
            )
        rng = np.random.default_rng(14)
        for types, interleaved in itertools.product(spec.TYPE_PAIRS, (0, 1)):
            inputs = make_inputs(
                rng, types, sizes=(2, 3, 5, 80), kv_heads=1, rotary_dim=46, scaled=True
            )
            options = {"interleaved": interleaved, "rotary_embedding_dim": 46}
            check_against_eager(inputs, f"{name} {types}", library=library, **options)


@pytest.mark.parametrize("isa", ["none", "AVX2", "baseline,avx2"])
def test_an_unknown_instruction_set_is_refused(load_copy, isa):
    library = load_copy(isa)
    machine = re.escape(f"on this machine, got {isa}")
    with pytest.raises(Exception, match=f"ROTARY_EXPORT_ISA must be one of .* {machine}"):
        run_session(make_inputs(np.random.default_rng(15)), library=library)
    with pytest.raises(RotaryExportError, match=f"ROTARY_EXPORT_ISA must be one of .* {machine}"):
        op_library.instruction_set()


def test_an_empty_variable_is_unset(load_copy):
    load_copy("")
    assert op_library.instruction_set() in {"baseline", "avx2", "avx512", "avx512bf16", "neon"}


def test_the_library_has_cpu_kernels():
    # For CUDA, see test_cuda_build.py.
    assert op_library.library_providers()[0] == "CPUExecutionProvider"


def test_every_folder_of_the_package_is_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(op_library, "package_folders", lambda: [tmp_path, LIBRARY.parent])
    assert op_library.op_library_path() == LIBRARY


def test_the_error_for_a_missing_library_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(op_library, "package_folders", lambda: [tmp_path])
    with pytest.raises(RotaryExportError, match=r"librotary_export\.so must be .*pip install \."):
        op_library.op_library_path()


def test_a_file_that_does_not_load_is_named(tmp_path, monkeypatch):
    path = tmp_path / op_library.LIBRARY_NAME
    path.write_text("not a library")
    monkeypatch.setattr(op_library, "package_folders", lambda: [tmp_path])
    with pytest.raises(RotaryExportError, match=f"{re.escape(str(path))} must be .*: "):
        op_library.instruction_set()


def test_a_library_that_is_not_ours_is_named(tmp_path, monkeypatch):
    path = shutil.copy(np.random._common.__file__, tmp_path / op_library.LIBRARY_NAME)
    monkeypatch.setattr(op_library, "package_folders", lambda: [tmp_path])
    with pytest.raises(RotaryExportError, match=f"{re.escape(str(path))} must be .*: .*undefined"):
        op_library.load_library()


def test_finding_it_needs_the_standard_library_only():
    code = (
        f"import runpy, sys; runpy.run_path({op_library.__file__!r}); "
        "print({'torch', 'onnxruntime', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"
