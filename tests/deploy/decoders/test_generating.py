"""Runtimes that generate from a bundle: the tokens are those of transformers' `generate`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from helpers.pages import Page
from helpers.paths import ROOT
from helpers.target_runs import TargetRun, read_version, record, require
from helpers.text_bundles import TOKENS, count_rotations, get_text_decoder

from rotary_export.deploy.deploy import deploy
from rotary_export.op.library import op_library_path

# By what rotates; trained weights take the time of all other tests of this file.
MODELS = {"portable": ("tiny",), "fused": ("tiny", "smollm2")}
NODES = {"portable": 2, "fused": 1}  # rotary nodes of a layer
PAGE = Page(ROOT / "rotary_export" / "models" / "decoder" / "README.md")

# Each prompt alone, all as one batch, one that is repeated with the padding token inside.
RUN_GENAI = """
import json, sys
import run
prompts, count, op_library = json.loads(sys.argv[1])
model = run.Model(op_library)
rows = [model.generate([ids], count)[0] for ids in prompts]
print(json.dumps([rows, model.generate(prompts, count)]))
"""
RUN_OPTIMUM = """
import json, sys
import onnxruntime, torch
from optimum.onnxruntime import ORTModelForCausalLM
prompts, count, bundle, library, profile, pad = json.loads(sys.argv[1])
options = onnxruntime.SessionOptions()
options.enable_profiling = True
options.profile_file_prefix = profile
if library:
    options.register_custom_ops_library(library)
model = ORTModelForCausalLM.from_pretrained(bundle, session_options=options)
def generate(prompts):
    size = max(map(len, prompts))
    ids = torch.tensor([[pad] * (size - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in prompts])
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False
    ).tolist()
    return [row[size - len(prompt):] for prompt, row in zip(prompts, made)]
rows = [generate([ids])[0] for ids in prompts]
print(json.dumps([rows, generate(prompts)]))
"""


def run_python(python: Path, folder: Path, *arguments: str) -> str:
    """Run Python in a folder and return its output; the folder's modules can be imported."""
    done = subprocess.run(
        [str(python), "-B", *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_rows(decoder, rows):
    """Every row is that of transformers; past the end of a text there may be padding."""
    for row, expected in zip(rows, decoder.expected, strict=True):
        assert row[: len(expected)] == expected
        assert len(set(row[len(expected) :])) <= 1


def check_path(folder: Path, decoder, path: str):
    """The profile has the rotary nodes of that path."""
    (profile,) = folder.glob("profile*.json")
    found = count_rotations(profile)
    assert found["Attention"] >= decoder.layers
    assert found["RotaryEmbedding"] == NODES[path] * found["Attention"]


def record_runs(target: str, version: str, path: str):
    """Keep one row of all models."""
    decoders = [get_text_decoder(name) for name in MODELS[path]]
    shapes = [
        f"{len(prompts)}x{max(map(len, prompts))}"
        for each in decoders
        for prompts in (*([ids] for ids in each.prompts), each.prompts)
    ]
    titles = ", ".join(decoder.title for decoder in decoders)
    note = f"{TOKENS} tokens, all those of model.generate: {titles}"
    shapes = list(dict.fromkeys(shapes))
    record(TargetRun(target, version, "model", "ran", path, ["float32"], shapes, note=note))


def run_genai(decoder, environment: Path, path: str, folder: Path):
    kit = deploy("genai", decoder.bundle, folder / "kit")
    config = json.loads((kit / "genai_config.json").read_text())
    options = config["model"]["decoder"]["session_options"]
    options["enable_profiling"] = str(folder / "profile")
    (kit / "genai_config.json").write_text(json.dumps(config))
    words = json.dumps([decoder.prompts, TOKENS, path == "fused"])
    rows, batch = json.loads(run_python(environment / "bin/python", kit, "-c", RUN_GENAI, words))
    assert rows == decoder.expected
    assert batch == decoder.expected
    check_path(folder, decoder, path)


def run_optimum(decoder, environment: Path, path: str, folder: Path):
    library = str(op_library_path()) if path == "fused" else ""
    pad, profile = decoder.model.config.pad_token_id, str(folder / "profile")
    words = json.dumps([decoder.prompts, TOKENS, str(decoder.bundle), library, profile, pad])
    python = environment / "bin" / "python"
    rows, batch = json.loads(run_python(python, folder, "-c", RUN_OPTIMUM, words))
    check_rows(decoder, rows)
    check_rows(decoder, batch)
    check_path(folder, decoder, path)


RUNTIMES = {
    "genai": ("onnxruntime-genai", "onnxruntime_genai", run_genai),
    "optimum": ("optimum", "optimum_onnx", run_optimum),
}


@pytest.mark.parametrize("path", MODELS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tokens_are_those_of_transformers(runtime, path, tmp_path):
    environment = require(runtime)
    title, package, run = RUNTIMES[runtime]
    for name in MODELS[path]:
        (tmp_path / name).mkdir()
        run(get_text_decoder(name), environment, path, tmp_path / name)
    record_runs(title, read_version(environment / "bin" / "python", package), path)


def test_the_program_reads_text(tmp_path):
    decoder = get_text_decoder("tiny")
    python = require("genai") / "bin" / "python"
    kit = deploy("genai", decoder.bundle, tmp_path / "kit")
    words = ["--max-new-tokens", str(TOKENS), *decoder.texts]
    lines = run_python(python, tmp_path, str(kit / "run.py"), *words).splitlines()
    printed = [json.loads(line) for line in lines]
    assert [line["ids"] for line in printed] == decoder.expected
    assert all(isinstance(line["text"], str) for line in printed)


def test_the_program_refuses_bad_prompts(tmp_path):
    python = require("genai") / "bin" / "python"
    kit = deploy("genai", get_text_decoder("tiny").bundle, tmp_path / "kit")
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
    decoder = get_text_decoder("tiny")
    python = require("optimum") / "bin" / "python"
    (tmp_path / "BUNDLE").symlink_to(decoder.bundle)
    (tmp_path / "librotary_export.so").symlink_to(op_library_path())
    blocks = [block.code for block in PAGE.blocks if block.language == "py"]
    program = "\n".join([*blocks, *blocks[0].splitlines()[-3:]])  # then as before, in the kernel
    first, second = run_python(python, tmp_path, "-c", program).splitlines()
    assert first == second != ""
