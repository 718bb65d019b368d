"""`tools/gpu/gpu_check.py` on the CPU: the same checks, and that each of them can fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gpu_check
import pytest
from gpu_models import CheckedDevice, build_model
from helpers.cuda_emulator import CSRC, compile_emulator, get_emulator

from rotary_export.op import library as op_library
from rotary_export.op import spec
from rotary_export.runtime.providers import CPU, CUDA, find_cuda_problem

ON_CPU = CheckedDevice(CPU)
CHECKS = gpu_check.list_checks(ON_CPU)


def test_the_report(tmp_path, capsys):
    out = tmp_path / "report.json"
    assert gpu_check.main(["--provider", CPU, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [row["check"] for row in report["checks"]] == list(CHECKS)
    assert all(row["passed"] for row in report["checks"])
    assert len(CHECKS) == len(spec.TYPE_PAIRS) + 6
    assert {row["by"] for row in report["times"]} == {"ours", "ONNX Runtime", "copy"}
    assert report["machine"]["provider"] == CPU
    for row in report["checks"]:
        assert row["found"] in printed
    assert f"{len(CHECKS)} of {len(CHECKS)} checks passed" in printed
    folder = str(Path(op_library.op_library_path()).parent)
    assert folder not in out.read_text()  # It goes into a public issue.


def test_a_failed_check_is_told_and_the_rest_still_runs(tmp_path, monkeypatch, capsys):
    def fail() -> str:
        raise RuntimeError("as expected")

    monkeypatch.setattr(gpu_check, "list_checks", lambda _: {"a": fail, "b": lambda: "fine"})
    monkeypatch.setattr(gpu_check, "measure", lambda *_: [])
    out = tmp_path / "report.json"
    assert gpu_check.main(["--provider", CPU, "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["checks"]
    assert [row["passed"] for row in rows] == [False, True]
    assert rows[0]["found"] == "RuntimeError: as expected"
    assert "1 of 2 checks passed" in capsys.readouterr().out


def test_without_a_gpu_it_exits_with_3(tmp_path, monkeypatch, capsys):
    problem = find_cuda_problem()
    if problem is None:
        problem = "as if there were none"
        monkeypatch.setattr(gpu_check, "find_cuda_problem", lambda: problem)
    out = tmp_path / "report.json"
    assert gpu_check.main(["--out", str(out)]) == 3
    assert capsys.readouterr().err == f"gpu_check: no GPU to check: {problem}\n"
    assert not out.exists()


def test_a_library_without_a_cuda_kernel_is_nothing_to_check(monkeypatch):
    monkeypatch.setattr(gpu_check, "find_cuda_problem", lambda: None)
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(op_library, "library_providers", lambda: (CPU,))
    assert "without nvcc" in str(gpu_check.find_problem())
    monkeypatch.setattr(op_library, "library_providers", lambda: (CPU, CUDA))
    assert gpu_check.find_problem() is None
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert "does not see a GPU" in str(gpu_check.find_problem())


# ---- the op for CUDA, its kernel emulated

PARITY = [name for name in CHECKS if "float32 and" in name or "bfloat16 and b" in name]


@pytest.mark.parametrize("name", [*PARITY, "ONNX Runtime's own op", "bad ids", "in place"])
def test_the_emulated_cuda_op_passes(name, monkeypatch):
    monkeypatch.setattr(op_library, "op_library_path", get_emulator)
    CHECKS[name]()


@pytest.fixture(scope="module")
def wrong_kernel(tmp_path_factory) -> Path:
    """A library that turns the other way."""
    folder = tmp_path_factory.mktemp("wrong")
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources)
    header = sources / "cuda" / "rotate_thread.h"
    right = header.read_text()
    assert "Add(a_cos, -b_sin)" in right
    header.write_text(right.replace("Add(a_cos, -b_sin)", "Add(a_cos, b_sin)"))
    return compile_emulator(folder, sources)


@pytest.mark.parametrize("name", [*PARITY, "ONNX Runtime's own op", "in place", "two streams"])
def test_a_wrong_kernel_fails(name, monkeypatch, wrong_kernel):
    monkeypatch.setattr(op_library, "op_library_path", lambda: wrong_kernel)
    with pytest.raises(gpu_check.CheckError, match=r"differ|ulp apart"):
        CHECKS[name]()


@pytest.mark.parametrize("name", ["node placement", "bad ids"])
def test_another_op_in_ours_place_fails(name, monkeypatch):
    monkeypatch.setattr(
        gpu_check, "build_model", lambda inputs, **_: build_model(inputs, ours=False)
    )
    with pytest.raises(gpu_check.CheckError):
        CHECKS[name]()


def test_a_bundle_that_would_not_run_its_portable_body_fails(monkeypatch):
    def keep_library(*arguments, library, **options):
        return gpu_models_read(*arguments, library=True, **options)

    gpu_models_read = gpu_check.read_placement
    monkeypatch.setattr(gpu_check, "read_placement", keep_library)
    with pytest.raises(gpu_check.CheckError, match="ran "):
        CHECKS["placement without opt-in"]()
