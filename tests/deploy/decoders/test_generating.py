"""Runtimes that generate from a bundle: the tokens are those of transformers' `generate`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from helpers.pages import Page
from helpers.paths import ROOT
from helpers.target_runs import TargetRun, read_version, record, require
from helpers.text_bundles import TOKENS, get_text_decoder
from helpers.text_runtimes import NODES, RUNTIMES, check_tokens, run_python

from rotary_export.deploy.deploy import deploy
from rotary_export.op.library import op_library_path

PAGE = Page(ROOT / "rotary_export" / "models" / "decoder" / "README.md")


@pytest.mark.parametrize("path", NODES)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tokens_are_those_of_transformers(runtime, path, tmp_path):
    check_tokens(runtime, path, get_text_decoder(), tmp_path, "model")


@pytest.fixture(scope="module")
def cpp_kit(tmp_path_factory):
    """Deploy and build the C++ program as the page says, but without optimization."""
    kit = deploy("genai", get_text_decoder().bundle, tmp_path_factory.mktemp("cpp") / "kit")
    (kit / "venv").symlink_to(require("genai"))
    build = find_command(kit, "g++").replace("-O2", "-O0 -Wall -Wextra -Werror")
    done = subprocess.run(build, shell=True, cwd=kit, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return kit


def find_command(kit: Path, word: str) -> str:
    """Return the line of the kit's page that begins so."""
    lines = (kit / "README.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(word)]
    return line


def run_cpp(kit: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the program by the page's line, with other words than its last ones."""
    line, _ = find_command(kit, "./generate").split(" . ")
    command = "\n".join([find_command(kit, "P="), " ".join([line, ".", *words])])
    return subprocess.run(["bash", "-c", command], cwd=kit, capture_output=True, text=True)


@pytest.mark.parametrize("path", NODES)
def test_the_cpp_program_generates(path, cpp_kit):
    decoder = get_text_decoder()
    words = [",".join(map(str, row)) for row in decoder.prompts]
    done = run_cpp(cpp_kit, str(TOKENS), *words, *(["--op-library"] if path == "fused" else []))
    assert done.returncode == 0, done.stderr
    rows = [[int(word) for word in line.split(",")] for line in done.stdout.splitlines()]
    assert rows == decoder.expected
    version = read_version(require("genai") / "bin" / "python", "onnxruntime_genai")
    shapes = [f"1x{len(prompt)}" for prompt in decoder.prompts]
    note = f"{TOKENS} tokens, all those of model.generate: {decoder.title}"
    target = "onnxruntime-genai, C++"
    record(TargetRun(target, version, "decoder", "ran", path, ["float32"], shapes, note=note))


def test_the_cpp_program_refuses(cpp_kit):
    done = run_cpp(cpp_kit, "8", "5", "6,96")
    why = "token ids must be >= 0 and < 96, got 96 in row 1, column 1"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {why}\n")
    done = run_cpp(cpp_kit, "64", "5")  # one more than genai has
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: max_length (65) cannot be greater than")
    (cpp_kit / "librotary_export.so").unlink()
    done = run_cpp(cpp_kit, "8", "5", "--op-library")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")


def test_the_program_reads_text(tmp_path):
    decoder = get_text_decoder()
    python = require("genai") / "bin" / "python"
    kit = deploy("genai", decoder.bundle, tmp_path / "kit")
    words = ["--max-new-tokens", str(TOKENS), *decoder.texts]
    lines = run_python(python, tmp_path, str(kit / "run.py"), *words).splitlines()
    printed = [json.loads(line) for line in lines]
    assert [line["ids"] for line in printed] == decoder.expected
    assert all(isinstance(line["text"], str) for line in printed)


def test_the_program_refuses_bad_prompts(tmp_path):
    python = require("genai") / "bin" / "python"
    kit = deploy("genai", get_text_decoder().bundle, tmp_path / "kit")
    program = """
import run
model = run.Model()
for prompts, count in (([[]], 1), ([[5], [5, 96]], 1), ([[5]], 64), ([[5]], 0)):
    try:
        model.check(prompts, count)
    except SystemExit as error:
        print(error)
"""
    assert run_python(python, kit, "-c", program).splitlines() == [
        "prompt 0 must have at least one token, got none",
        "prompt 1 must have ids in [0, 96), got 96",
        "prompt and new tokens must be at most 64, got 1 + 64 of prompt 0",
        "--max-new-tokens must be >= 1, got 0",
    ]


def test_the_page_of_optimum(tmp_path):
    """Its lines run as they stand, with and without the op library."""
    decoder = get_text_decoder()
    python = require("optimum") / "bin" / "python"
    (tmp_path / "BUNDLE").symlink_to(decoder.bundle)
    (tmp_path / "librotary_export.so").symlink_to(op_library_path())
    blocks = [block.code for block in PAGE.blocks if block.language == "py"]
    program = "\n".join([*blocks, *blocks[0].splitlines()[-3:]])  # then as before, in the kernel
    first, second = run_python(python, tmp_path, "-c", program).splitlines()
    assert first == second != ""
