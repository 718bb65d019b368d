"""C++, ONNX Runtime: the kit generates what eager's `generate` does, in memory allocated once."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bundles import make_folder, update_hash
from helpers.decoders import export_decoder, generate_eager
from helpers.paths import KITS, ROOT
from helpers.target_runs import TargetRun, record, require
from helpers.text_decoders import NUM_TOKENS, PROMPTS, get_text_decoder

from rotary_export import load_decoder
from rotary_export.deploy.deploy import deploy
from rotary_export.errors import RotaryExportError
from rotary_export.op.library import op_library_path

NAME = "cpp-onnxruntime"
NEWEST = "1.31.1"
OLDEST = {"fused": "1.23.2", "portable": "1.25.1"}  # of opset 23
COUNTER = ROOT / "tests" / "helpers" / "count_news.h"


@functools.cache
def get_kit(kind: str) -> Path:
    """Deploy a decoder with a cache of this kind, "full" or "static"."""
    require(NAME)
    model, bundle = get_text_decoder("full")
    if kind == "static":
        options = {"cache": "static", "max_cache_len": 48, "last_logits": True}
        bundle = export_decoder(model, make_folder() / "static", **options)
    return deploy(NAME, bundle, make_folder() / f"cpp-{kind}")


@functools.cache
def get_program() -> Path:
    """Build the program as the page says, but faster, and with a count of its allocations."""
    kit = get_kit("full")
    headers = f"-DORT_HEADERS={ROOT / 'build' / 'ort_headers'}"
    flags = {"CXXFLAGS": f"-Werror -include {COUNTER}"}
    for words in (
        ["-B", "build", headers, "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0"],
        ["--build", "build", "--target", "rotary_generate"],
    ):
        done = subprocess.run(
            ["cmake", *words], cwd=kit, env=os.environ | flags, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return kit / "build" / "rotary_generate"


def call(
    kit: Path,
    count: Any,
    *prompts: str,
    path: str = "portable",
    version: str = NEWEST,
    facts: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the program; `facts` replaces decoder.txt."""
    runtime = require(NAME) / version / "onnxruntime" / "capi" / f"libonnxruntime.so.{version}"
    words = [runtime, kit / "bundle" / "model.onnx", facts or kit / "decoder.txt", count, *prompts]
    if path == "fused":
        words += ["--op-library", op_library_path()]
    command = list(map(str, [get_program(), *words]))
    environment = os.environ | {"COUNT_NEWS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def run(kit: Path, count: int, prompts: Sequence[Sequence[int]], **options: Any) -> Any:
    """Return the rows, and how often the program allocated."""
    done = call(kit, count, *(",".join(map(str, row)) for row in prompts), **options)
    assert done.returncode == 0, done.stderr
    speed, news = done.stderr.splitlines()
    new = sum(map(len, rows := read_rows(done.stdout))) - sum(map(len, prompts))
    assert speed.startswith(f"{new} tokens in ")
    assert speed.endswith(" tokens/s")
    return rows, int(news.removesuffix(" news"))


def read_rows(text: str) -> list[list[int]]:
    return [[int(word) for word in line.split(",")] for line in text.splitlines()]


def generate(prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Return what eager generates after each prompt alone."""
    model = get_text_decoder("full")[0]
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        rows += generate_eager(model, ids, torch.ones_like(ids), NUM_TOKENS, **options).tolist()
    return rows


@pytest.mark.parametrize("path", ["fused", "portable"])
@pytest.mark.parametrize("kind", ["full", "static"])
def test_tokens_are_those_of_transformers(kind, path):
    expected = generate(PROMPTS)
    for version in (NEWEST, OLDEST[path]):
        assert run(get_kit(kind), NUM_TOKENS, PROMPTS, path=path, version=version)[0] == expected
    if kind == "static":
        note = f"{NUM_TOKENS} tokens, all those of model.generate; full and static cache"
        shapes = [f"1x{len(prompt)}" for prompt in PROMPTS]
        row = TargetRun(
            "C++, ONNX Runtime",
            f"{OLDEST[path]}, {NEWEST}",
            "decoder",
            "ran",
            path,
            ["float32"],
            shapes,
            note=note,
        )
        record(row)


@pytest.mark.parametrize("kind", ["full", "static"])
def test_a_step_allocates_nothing(kind):
    """Of the program's own code: ONNX Runtime's is not counted."""
    few, many = (run(get_kit(kind), count, PROMPTS)[1] for count in (4, 24))
    assert few == many > 0


def edit_facts(folder: Path, kind: str = "full", **changed: Any) -> Path:
    """Write a decoder.txt in which some lines have other values."""
    lines = [line.split() for line in (get_kit(kind) / "decoder.txt").read_text().splitlines()]
    assert changed.keys() <= {name for name, *_ in lines}
    values = [(name, changed.get(name, " ".join(words))) for name, *words in lines]
    facts = folder / "decoder.txt"
    facts.write_text("\n".join(f"{name} {value}" for name, value in values))
    return facts


@pytest.mark.parametrize("kind", ["full", "static"])
@pytest.mark.parametrize(
    "changed",
    [{"chunk": 2}, {"chunk": 2, "length_thresholds": 4}, {"cache_resets": "8 11", "chunk": 3}],
    ids=["chunks", "whole", "anew"],
)
def test_a_prompt_in_chunks_and_a_cache_computed_anew(changed, kind, tmp_path):
    facts = edit_facts(tmp_path, kind, **changed)
    assert run(get_kit(kind), NUM_TOKENS, PROMPTS, facts=facts)[0] == generate(PROMPTS)


def test_settings_of_the_model_are_applied(tmp_path):
    plain = generate(PROMPTS)
    end, suppressed = plain[0][9], plain[1][6]
    for facts, options in (
        ({"eos_token_ids": f"{end} 99"}, {"eos_token_id": [end, 99]}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"suppress_tokens": suppressed}, {"suppress_tokens": [suppressed]}),
    ):
        expected = generate(PROMPTS, **options)
        assert expected != plain
        facts = edit_facts(tmp_path, **facts)
        assert run(get_kit("full"), NUM_TOKENS, PROMPTS, facts=facts)[0] == expected


@pytest.mark.parametrize("kind", ["full", "static"])
@pytest.mark.parametrize(
    ("count", "rows"),
    [
        (1, [[5], [6, 96]]),
        (1, [[10**17]]),
        (1, [[5] * 99]),
        (60, [[5] * 9]),
        (0, [[5]]),
    ],
)
def test_mistakes_have_the_words_of_python(count, rows, kind):
    kit = get_kit(kind)
    with pytest.raises(RotaryExportError) as raised:
        load_decoder(kit / "bundle").generate(rows, max_new_tokens=count)
    check_refused(str(raised.value), call(kit, count, *(",".join(map(str, row)) for row in rows)))


def check_refused(message: str, done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    error, news = done.stderr.splitlines()
    assert error == f"error: {message}"
    assert news.endswith(" news")


@pytest.mark.parametrize("words", [("8", "5,x"), ("8", ""), ("8", "5,,6"), ("8", "-1"), ("x", "5")])
def test_words_that_are_no_integers(words):
    (bad,) = [part for word in words for part in word.split(",") if not part.isdigit()]
    check_refused(f"'{bad}' is not an integer >= 0", call(get_kit("full"), *words))


def test_what_the_loop_does_not_run_is_refused(tmp_path):
    bundle = Path(shutil.copytree(get_text_decoder("full")[1], tmp_path / "bundle"))
    content = json.loads((bundle / "generation_config.json").read_text())
    (bundle / "generation_config.json").write_text(json.dumps(content | {"num_beams": 4}))
    update_hash(bundle, "generation_config.json")
    with pytest.raises(RotaryExportError) as raised:
        load_decoder(bundle).generate([[5]], max_new_tokens=1)
    check_refused(str(raised.value), call(deploy(NAME, bundle, tmp_path / "kit"), 8, "5"))
    facts = tmp_path / "none.txt"
    why = "can't be read: deploy writes it for a model exported with its cache"
    check_refused(f"{facts} {why}", call(get_kit("full"), 8, "5", facts=facts))
    facts.write_text("tokens input_ids")
    why = f"{facts} does not describe a decoder"
    check_refused(why, call(get_kit("full"), 8, "5", facts=facts))
    usage = "usage: rotary_generate RUNTIME GRAPH.onnx decoder.txt MAX_NEW_TOKENS IDS... "
    check_refused(usage + "[--op-library FILE]", call(get_kit("full"), 8))


def test_the_command_of_the_page():
    kit = get_kit("full")
    page = (kit / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^build/rotary_generate .*", page, re.MULTILINE)[0]
    get_program()
    (kit / "ort").symlink_to(require(NAME) / NEWEST)
    (kit / "build" / "librotary_export.so").symlink_to(op_library_path())
    done = subprocess.run(["bash", "-c", command], cwd=kit, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_rows(done.stdout) == generate([[5, 6, 7], [8, 9]])


def test_the_loop_is_small():
    assert len((KITS / NAME / "generate.cc").read_text().splitlines()) <= 160
