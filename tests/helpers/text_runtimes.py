"""Runtimes that generate from a bundle of text, each in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from helpers.target_runs import TargetRun, read_version, record, require
from helpers.text_bundles import TOKENS, TextDecoder, count_rotations

from rotary_export.deploy.deploy import deploy
from rotary_export.op.library import op_library_path

NODES = {"portable": 2, "fused": 1}  # rotary nodes of a layer, by what rotates

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
        [str(python), *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_rows(decoder: TextDecoder, rows: list[list[int]]) -> None:
    """Every row is that of transformers; past the end of a text there may be padding."""
    for row, expected in zip(rows, decoder.expected, strict=True):
        assert row[: len(expected)] == expected
        assert len(set(row[len(expected) :])) <= 1


def check_path(folder: Path, decoder: TextDecoder, path: str) -> None:
    """The profile has the rotary nodes of that path."""
    (profile,) = folder.glob("profile*.json")
    found = count_rotations(profile)
    assert found["Attention"] >= decoder.layers
    assert found["RotaryEmbedding"] == NODES[path] * found["Attention"]


def run_genai(decoder: TextDecoder, environment: Path, path: str, folder: Path) -> None:
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


def run_optimum(decoder: TextDecoder, environment: Path, path: str, folder: Path) -> None:
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


def check_tokens(runtime: str, path: str, decoder: TextDecoder, folder: Path, graph: str) -> None:
    """Generate in a runtime, compare with transformers, and record the run.

    Args:
        runtime: One of RUNTIMES.
        path: "fused" or "portable".
        decoder: What is generated from.
        folder: An empty one.
        graph: For the table of targets.
    """
    environment = require(runtime)
    title, package, run = RUNTIMES[runtime]
    run(decoder, environment, path, folder)
    version = read_version(environment / "bin" / "python", package)
    batch = f"{len(decoder.prompts)}x{max(map(len, decoder.prompts))}"
    shapes = dict.fromkeys([*(f"1x{len(ids)}" for ids in decoder.prompts), batch])
    note = f"{TOKENS} tokens, all those of model.generate: {decoder.title}"
    record(TargetRun(title, version, graph, "ran", path, ["float32"], [*shapes], note=note))
