"""C++, AOTInductor: the format `aoti`, and the kit that runs it, at untraced shapes.

The C++ compiler needs some ten seconds for a graph, so there are only two bundles.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.bundles import check_refused, get_bundle, make_arrays, run_eager, to_torch
from helpers.cpp_kits import AOTI, FILES, MISTAKES, build_kit, check_example, run_kit
from helpers.oracles import assert_same_bits
from helpers.target_runs import get_model, require

import rotary_export
from rotary_export import load
from rotary_export.bundle.manifest import read_manifest
from rotary_export.cli.inspection import inspect_path
from rotary_export.cli.main import cli
from rotary_export.deploy.deploy import deploy

FORMATS = ("torchscript", "program", "aoti")
SHAPES = ((1, 1), (3, 7), (2, 31), (5, 200), (0, 4), (2, 0))  # traced at (2, 2)
NO_AVX2 = {"ATEN_CPU_CAPABILITY": "default"}  # torch then reports such a machine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """As "plain" of bundles.SPECS, from the command line."""
    require("cpp-libtorch")
    path = tmp_path_factory.mktemp("aoti") / "plain"
    options = ["--dim", "16", "--head-dim", "24", "--max-seq-len", "32", "--out", str(path)]
    options += [word for kind in FORMATS for word in ("--format", kind)]
    result = CliRunner().invoke(cli, ["export", *options])
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def kit(bundle, tmp_path_factory):
    return deploy("cpp-aoti", bundle, tmp_path_factory.mktemp("aoti") / "kit", allow_code=True)


@pytest.fixture(scope="module")
def program(kit):
    return build_kit(kit)


# ---- the format


def test_is_proven_and_marked(bundle):
    manifest = read_manifest(bundle)
    assert manifest.graphs["rotate"].files["aoti"] == "rotate.aoti.pt2"
    assert manifest.compiled_for == {
        "system": "Linux",
        "machine": "x86_64",
        "instruction_set": "AVX2",
    }
    assert inspect_path(bundle)["compiled graphs need instruction_set"] == "AVX2"
    rows = [row for row in manifest.parity["rows"] if row["runtime"] == "AOTInductor"]
    assert {row["output"] for row in rows} == {"freqs", "scale", "query_out", "key_out"}
    assert all(row["eager"]["exact"] for row in rows)
    assert rotary_export.verify(bundle, allow_code=True).passed


def test_contains_no_path_of_this_machine(bundle):
    places = [bundle.parent, Path(torch.__file__).parent.parent, Path.home(), Path(sys.prefix)]
    for file in bundle.glob("*.aoti.pt2"):
        with zipfile.ZipFile(file) as package:
            members = {name: package.read(name) for name in package.namelist()}
        assert not [name for name in members if name.endswith((".cpp", ".h"))]
        assert [name for name in members if name.endswith(".so")]
        for data in members.values():
            assert [place for place in places if str(place).encode() in data] == []


def test_runs_in_python(bundle):
    session = load(bundle, "rotate", "aoti", allow_code=True)
    for batch, seq_len in SHAPES:
        arrays = make_arrays("plain", batch=batch, seq_len=seq_len)
        got, want = session(**arrays), run_eager("plain", arrays)
        for name, value in want.items():
            assert_same_bits(to_torch(got[name]), value, f"{name} at {batch}x{seq_len}")
    bad = make_arrays("plain") | {"position_ids": np.full((3, 7), 32)}
    with pytest.raises(ValueError, match=r"position_ids must be in \[0, 32\), got 32 at batch 0"):
        session(**bad)


def test_torch_too_raises_for_a_bad_id(bundle):
    """In a parallel region it would end the process: only the kit's check would prevent that."""
    path = str(bundle / "rotate.aoti.pt2")
    loader = torch._C._aoti.AOTIModelPackageLoader(path, "model", False, 1, -1)
    tensors = {k: to_torch(v) for k, v in make_arrays("plain", batch=40, seq_len=99).items()}
    for bad in (32, -1):
        tensors["position_ids"][-1, -1] = bad
        with pytest.raises(RuntimeError, match="index out of bounds"):
            loader.boxed_run(list(tensors.values()))


def test_a_machine_without_the_instruction_set(bundle, tmp_path):
    def call(*arguments):
        command = [sys.executable, "-m", "rotary_export", *map(str, arguments)]
        environment = os.environ | NO_AVX2
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    why = "it needs Linux x86_64 with AVX2, this is Linux x86_64 with DEFAULT"
    options = ["--runtime", "aoti", "--allow-code", "--graph", "tables", "--input", "seq_len=3"]
    done = call("run", bundle, *options, "--out", tmp_path / "x.npz")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"\nrotary-export: tables.aoti.pt2 can't run here: {why}\n")
    done = call("verify", bundle, "--allow-code")
    assert done.returncode == 0, done.stderr
    assert f"not run: AOTInductor: {why}" in done.stdout
    options = ["--dim", "16", "--max-seq-len", "32", "--format", "program", "--format", "aoti"]
    done = call("export", *options, "--out", tmp_path / "b")
    assert done.returncode == 2
    assert f"the format 'aoti' can't be proven here: {why}" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- the kit


def test_runs_the_example_of_the_page(kit, program):
    check_example(program, kit, "rotate.aoti.pt2")


def test_rotate_is_equal_to_eager(kit, program, tmp_path):
    AOTI.check_rotate(program, kit, "plain", SHAPES, tmp_path)


def test_a_whole_model_is_equal_to_eager_and_generates(program, tmp_path, capfd):
    bundle = rotary_export.export_model(
        get_model(), None, tmp_path / "llama", cache="full", formats=["program", "aoti"], quick=True
    )
    assert "torch/" not in capfd.readouterr().err  # nothing is logged on the way
    assert "AOTInductor" in {row.runtime for row in bundle.report.rows}
    kit = deploy("cpp-aoti", bundle, tmp_path / "kit", allow_code=True)
    AOTI.check_model(program, kit, tmp_path)
    AOTI.check_generates(program, [kit], "full cache")


@pytest.mark.parametrize("mistake", [*FILES, *MISTAKES])
def test_a_mistake_is_one_clear_error(mistake, kit, program, tmp_path):
    AOTI.check_mistake(program, kit, mistake, tmp_path / "case")


def test_the_program_refuses_a_machine_without_the_instruction_set(kit, program):
    done = run_kit(program, kit, "rotate.aoti.pt2", "example", **NO_AVX2)
    assert done.returncode == 1
    assert done.stderr == (
        "error: bundle/rotate.aoti.pt2 can't run here: it needs AVX2, this machine has DEFAULT\n"
    )


def test_deploy_requires_the_format(tmp_path):
    act = lambda: deploy("cpp-aoti", get_bundle("plain"), tmp_path / "out")  # noqa: E731
    check_refused("cpp-aoti needs the format 'aoti', but the bundle was exported", act, tmp_path)
