"""C++, libtorch: the kit is built as its page says and runs TorchScript at untraced shapes.

Decoders with a cache generate.
"""

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
from helpers.target_runs import get_model, get_model_bundle, require

from rotary_export import export_model
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


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """A decoder with a growing cache, and one with a static cache and the last logits alone."""
    folder = tmp_path_factory.mktemp("decoders")
    kits = []
    for options in (
        {"cache": "full"},
        {"cache": "static", "max_cache_len": 48, "last_logits": True},
    ):
        bundle = export_model(
            get_model(),
            None,
            folder / options["cache"],
            formats=["torchscript"],
            quick=True,
            **options,
        )
        kits.append(
            deploy("cpp-libtorch", bundle, folder / f"kit-{options['cache']}", allow_code=True)
        )
    return kits


def test_a_decoder_generates(decoders, program):
    LIBTORCH.check_generates(program, decoders, "full and static cache")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["8", "5,96"], "token ids must be >= 0 and < 96, got 96 in row 0, column 1"),
        (
            ["47", "5,6,7"],
            "max_new_tokens must be <= 46 after a prompt of 3 tokens, the cache has 48",
        ),
        (["8", "5,x"], "'x' is not an integer >= 0"),
    ],
)
def test_a_prompt_that_is_refused(words, message, decoders, program):
    done = run_kit(program, decoders[1], "model.pt", "--generate", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message}")


def test_a_graph_without_a_cache_does_not_generate(kit, program):
    done = run_kit(program, kit, "rotate.pt", "--generate", "8", "5,6")
    assert done.stderr == (
        "error: decoder.txt can't be read: deploy writes it for a model exported with its cache\n"
    )
    done = run_kit(program, kit, "rotate.pt", "--generate", "8")
    assert done.returncode == 2
    assert "run GRAPH.pt signature.txt --generate MAX_NEW_TOKENS IDS...\n" in done.stderr


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
