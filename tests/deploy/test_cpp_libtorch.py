"""C++, libtorch: the kit is built as its page says and runs TorchScript at untraced shapes."""

from __future__ import annotations

import shutil

import pytest
from helpers.bundles import get_bundle, make_arrays
from helpers.cpp_kits import (
    FILES,
    LIBTORCH,
    MISTAKES,
    build_kit,
    check_example,
    run_kit,
    write_folder,
)
from helpers.target_runs import get_model_bundle, require

from rotary_export.deploy.deploy import deploy

SHAPES = ((1, 1), (3, 7), (2, 31), (5, 200))  # traced at (2, 2)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    require("cpp-libtorch")
    return deploy("cpp-libtorch", get_bundle("plain"), tmp_path_factory.mktemp("libtorch") / "kit")


@pytest.fixture(scope="module")
def program(kit):
    return build_kit(kit)


def test_runs_the_example_of_the_page(kit, program):
    check_example(program, kit, "rotate.pt")


@pytest.mark.parametrize("name", ["plain", "xpos", "float16", "bfloat16", "float64"])
def test_rotate_is_equal_to_eager(name, program, tmp_path):
    kit = deploy("cpp-libtorch", get_bundle(name), tmp_path / "kit")
    LIBTORCH.check_rotate(program, kit, name, SHAPES, tmp_path)


def test_a_whole_model_is_equal_to_eager(program, tmp_path):
    kit = deploy("cpp-libtorch", get_model_bundle(), tmp_path / "kit")
    LIBTORCH.check_model(program, kit, tmp_path)


@pytest.mark.parametrize("mistake", [*FILES, *MISTAKES])
def test_a_mistake_is_one_clear_error(mistake, kit, program, tmp_path):
    LIBTORCH.check_mistake(program, kit, mistake, tmp_path / "case")


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
