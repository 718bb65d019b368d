"""Runtimes that generate from a bundle: the tokens are those of transformers' `generate`."""

from __future__ import annotations

import json

import pytest
from helpers.pages import Page
from helpers.paths import ROOT
from helpers.target_runs import require
from helpers.text_bundles import TOKENS, get_text_decoder
from helpers.text_runtimes import NODES, RUNTIMES, check_tokens, run_python

from rotary_export.deploy.deploy import deploy
from rotary_export.op.library import op_library_path

PAGE = Page(ROOT / "rotary_export" / "models" / "decoder" / "README.md")


@pytest.mark.parametrize("path", NODES)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tokens_are_those_of_transformers(runtime, path, tmp_path):
    check_tokens(runtime, path, get_text_decoder(), tmp_path, "model")


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
