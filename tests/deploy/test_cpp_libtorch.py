"""C++, libtorch: the kit is built as its page says and runs TorchScript at untraced shapes."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers.bundles import get_bundle, make_arrays, run_eager
from helpers.cpp_kits import VERSION, build_kit, read_folder, run_kit, to_arrays, write_folder
from helpers.paths import KITS
from helpers.target_runs import (
    Row,
    compare,
    get_model_bundle,
    make_model_arrays,
    record,
    require,
    run_model_eager,
)

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.deploy.deploy import deploy
from rotary_export.deploy.signature import write_signature
from rotary_export.proof.tolerances import TOLERANCES

TARGET = "C++, libtorch"
SHAPES = [(1, 1), (3, 7), (2, 31), (5, 200)]  # traced at (2, 2)
MODEL_SHAPES = [(1, 1), (3, 17), (2, 40)]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    require("cpp-libtorch")
    return deploy("cpp-libtorch", get_bundle("plain"), tmp_path_factory.mktemp("libtorch") / "kit")


@pytest.fixture(scope="module")
def program(kit):
    return build_kit(kit)


def test_runs_the_example_of_the_page(kit, program):
    done = run_kit(program, kit, "rotate.pt", "example")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("differs from expected by 0\n") == 2


@pytest.mark.parametrize("name", ["plain", "xpos", "float16", "bfloat16", "float64"])
def test_rotate_is_equal_to_eager(name, program, tmp_path):
    kit = deploy("cpp-libtorch", get_bundle(name), tmp_path / "kit")
    cases = [make_arrays(name, batch=b, seq_len=s, seed=s) for b, s in SHAPES]
    folders = [write_folder(tmp_path / str(i), case) for i, case in enumerate(cases)]
    done = run_kit(program, kit, "rotate.pt", *folders)
    assert done.returncode == 0, done.stderr
    for folder, case in zip(folders, cases, strict=True):
        want = to_arrays(run_eager(name, case))
        compare(read_folder(folder, want), want, 0)
    dtype = get_bundle(name).manifest.dtype
    shapes = [f"{b}x{s}" for b, s in SHAPES]
    record(
        Row(TARGET, f"torch {VERSION}", "rotate", "ran", "TorchScript", [dtype], shapes, 0.0, True)
    )


def test_a_whole_model_is_equal_to_eager(program, tmp_path):
    kit = deploy("cpp-libtorch", get_model_bundle(), tmp_path / "kit")
    cases = [make_model_arrays(b, s) for b, s in MODEL_SHAPES]
    folders = [write_folder(tmp_path / str(i), case) for i, case in enumerate(cases)]
    done = run_kit(program, kit, "model.pt", *folders)
    assert done.returncode == 0, done.stderr
    allowed = TOLERANCES["model"].max_ulp * np.finfo(np.float32).eps
    results = []
    for folder, case in zip(folders, cases, strict=True):
        want = run_model_eager(case)
        results.append(compare(read_folder(folder, want), want, allowed))
    worst, exact = max(r[0] for r in results), all(r[1] for r in results)
    shapes = [f"{b}x{s}" for b, s in MODEL_SHAPES]
    version = f"torch {VERSION}"
    record(Row(TARGET, version, "model", "ran", "TorchScript", ["float32"], shapes, worst, exact))


MISTAKES = {
    "no file": ("nix.pt", {}, "bundle/nix.pt must be a TorchScript file, GRAPH.pt; torch: "),
    "a program": (
        "rotate.pt2",
        {},
        "bundle/rotate.pt2 must be a TorchScript file, GRAPH.pt; torch: ",
    ),
    "no input": ("rotate.pt", {"key": None}, "key.npy can't be read"),
    "type": (
        "rotate.pt",
        {"query": np.zeros((3, 4, 7, 24))},
        "query must be float32, got Double",
    ),
    "shape": (
        "rotate.pt",
        {"key": np.zeros((3, 2, 6, 24), np.float32)},
        "key must have shape (batch_size, num_kv_heads, seq_len, 24), batch_size=3, num_heads=4, "
        "num_kv_heads=2, seq_len=7, got [3, 2, 6, 24]",
    ),
    "bad id": (
        "rotate.pt",
        {"position_ids": np.full((3, 7), 32)},
        "position_ids must be in [0, 31], got 32",
    ),
    "negative id": (
        "rotate.pt",
        {"position_ids": np.full((3, 7), -1)},
        "position_ids must be in [0, 31], got -1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_error(mistake, kit, program, tmp_path):
    file, changed, message = MISTAKES[mistake]
    arrays = {k: v for k, v in (make_arrays("plain") | changed).items() if v is not None}
    done = run_kit(program, kit, file, write_folder(tmp_path / "case", arrays))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "case" / "out").exists()


def test_a_sum_of_sizes(kit, program, tmp_path):
    """As of a key/value cache, "past_seq_len + seq_len": here the heads of query are such a sum."""
    shutil.copytree(kit, tmp_path / "kit")
    signature = (tmp_path / "kit" / "signature.txt").read_text()
    (tmp_path / "kit" / "signature.txt").write_text(
        signature.replace(" num_heads ", " num_kv_heads+2 ")
    )
    for heads in (4, 5):
        case = write_folder(tmp_path / str(heads), make_arrays("plain", heads=heads))
        done = run_kit(program, tmp_path / "kit", "rotate.pt", case)
        assert done.returncode == int(heads != 4)
    assert "query must have shape (batch_size, num_kv_heads+2, seq_len, 24)" in done.stderr


def test_a_largest_size(kit, program, tmp_path):
    shutil.copytree(kit, tmp_path / "kit")
    with (tmp_path / "kit" / "signature.txt").open("a") as file:
        file.write("max_size seq_len 7\n")
    for seq_len in (7, 8):
        case = write_folder(tmp_path / str(seq_len), make_arrays("plain", seq_len=seq_len))
        done = run_kit(program, tmp_path / "kit", "rotate.pt", case)
        assert done.returncode == int(seq_len == 8)
    assert done.stderr == "error: seq_len must be <= 7, got 8\n"


def test_the_signature_says_all_of_the_manifest(tmp_path):
    manifest = get_bundle("plain").manifest
    rotate = replace(
        manifest.graphs["rotate"],
        inputs=(
            TensorInfo("mask", "bool", ("batch_size", "past_len + seq_len")),
            TensorInfo("ids", "int64", (2, "seq_len"), (0, 9)),
        ),
        max_size={"seq_len": 64},
    )
    write_signature(tmp_path, replace(manifest, graphs={"rotate": rotate}), "rotate")
    assert (tmp_path / "signature.txt").read_text().splitlines() == [
        "input mask bool batch_size past_len+seq_len",
        "input ids int64 2 seq_len in 0 9",
        "output query_out",
        "output key_out",
        "max_size seq_len 64",
    ]


def test_both_kits_hold_the_same_headers():
    kits = [KITS / name for name in ("cpp-libtorch", "cpp-aoti")]
    for name in ("npy.h", "signature.h", "folder.h"):
        assert len({(kit / name).read_text() for kit in kits}) == 1
