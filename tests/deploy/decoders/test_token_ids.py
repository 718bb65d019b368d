"""C++ with ONNX Runtime, and OpenVINO: kits whose tokens are those of eager's `generate`."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bundles import edit_manifest, make_folder, update_hash
from helpers.decoders import export_decoder, generate_eager
from helpers.paths import KITS, ROOT
from helpers.target_runs import TargetRun, record, require
from helpers.text_decoders import NUM_TOKENS, PROMPTS, get_text_decoder

from rotary_export import load_decoder
from rotary_export.bundle.manifest import read_manifest
from rotary_export.deploy.deploy import deploy
from rotary_export.deploy.signature import write_decoder
from rotary_export.errors import RotaryExportError
from rotary_export.op.library import op_library_path

CPP, OPENVINO = "cpp-onnxruntime", "openvino"
NEWEST = "1.31.1"
OLDEST = {"fused": "1.23.2", "portable": "1.25.1"}  # of opset 23
COUNTER = ROOT / "tests" / "helpers" / "count_news.h"


@functools.cache
def get_bundle(kind: str) -> Path:
    """Return a decoder with a cache of this kind, "full" or "static"."""
    model, bundle = get_text_decoder("full")
    if kind == "full":
        return bundle
    options = {"cache": "static", "max_cache_len": 48, "last_logits": True}
    return export_decoder(model, make_folder() / "token-ids-static", **options)


@functools.cache
def get_kit(target: str, kind: str) -> Path:
    require(target)
    return deploy(target, get_bundle(kind), make_folder() / f"{target}-{kind}")


@functools.cache
def get_program() -> Path:
    """Build the program as the page says, but faster, and with a count of its allocations."""
    kit = get_kit(CPP, "full")
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
    runtime = require(CPP) / version / "onnxruntime" / "capi" / f"libonnxruntime.so.{version}"
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


def read_lines(kit: Path) -> dict[str, str]:
    """Return the lines of decoder.txt by name."""
    lines = (kit / "decoder.txt").read_text().splitlines()
    return dict(line.partition(" ")[::2] for line in lines)


def test_the_facts_of_a_graph(tmp_path):
    facts = {kind: read_lines(get_kit(CPP, kind)) for kind in ("full", "static")}
    static = {"max_cache_len": "48", "max_positions": "48", "holder": "cache", "last_logits": "1"}
    assert facts["static"] == facts["full"] | static
    assert facts["full"] == {
        "tokens": "input_ids",
        "num_tokens": "96",
        "logits": "logits",
        "logits_dtype": "float32",
        "last_logits": "0",
        "vocab_size": "96",
        "chunk": "512",
        "max_cache_len": "0",
        "max_positions": "64",
        "max_past_len": "-1",
        "holder": "model",
        "eos_token_ids": "2",
        "suppress_tokens": "",
        "repetition_penalty": "1.0",
        "cache_resets": "",
        "length_thresholds": "",
    }
    bundle = copy_with_settings(tmp_path, eos_token_id=[2, 5], suppress_tokens=[7, 8])
    config = read_manifest(bundle).config
    decoder = config["decoder"] | {"length_thresholds": [24], "max_positions": None}
    edit_manifest(bundle, config=config | {"decoder": decoder, "length_thresholds": [24, 40]})
    found = read_lines(deploy(CPP, bundle, tmp_path / "kit"))
    assert found == facts["full"] | {
        "eos_token_ids": "2 5",
        "suppress_tokens": "7 8",
        "max_positions": "-1",
        "cache_resets": "24",
        "length_thresholds": "24 40",
    }


def test_graphs_that_the_loop_does_not_run(tmp_path):
    manifest = read_manifest(get_bundle("full"))
    info = manifest.graphs["model"]
    for name, changed, why in (
        (
            "attention_mask",
            {"dtype": "float32"},
            "float32 ('batch_size', 'past_seq_len + seq_len')",
        ),
        (
            "position_ids",
            {"shape": (3, "batch_size", "seq_len")},
            "int64 (3, 'batch_size', 'seq_len')",
        ),
    ):
        inputs = [replace(i, **changed) if i.name == name else i for i in info.inputs]
        graphs = {"model": replace(info, inputs=tuple(inputs))}
        write_decoder(tmp_path, replace(manifest, graphs=graphs), "model")
        why = f"{name} must be int64 of 2 dimensions for the kit's loop, got {why}"
        assert (tmp_path / "decoder.txt").read_text() == f"refused {why}\n"
    write_decoder(tmp_path, replace(manifest, graphs={"encoder": info, "decoder": info}), "decoder")
    why = "the kit's loop runs a bundle of one graph, got encoder, decoder"
    assert (tmp_path / "decoder.txt").read_text() == f"refused {why}\n"


# ---- C++


@pytest.mark.parametrize("path", ["fused", "portable"])
@pytest.mark.parametrize("kind", ["full", "static"])
def test_tokens_are_those_of_transformers(kind, path):
    expected = generate(PROMPTS)
    for version in (NEWEST, OLDEST[path]):
        assert (
            run(get_kit(CPP, kind), NUM_TOKENS, PROMPTS, path=path, version=version)[0] == expected
        )
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
    few, many = (run(get_kit(CPP, kind), count, PROMPTS)[1] for count in (4, 24))
    assert few == many > 0


def edit_facts(folder: Path, kind: str = "full", **changed: Any) -> Path:
    """Write a decoder.txt in which some lines have other values."""
    lines = read_lines(get_kit(CPP, kind))
    assert changed.keys() <= lines.keys()
    facts = Path(tempfile.mkdtemp(dir=folder)) / "decoder.txt"
    facts.write_text("\n".join(f"{name} {value}" for name, value in (lines | changed).items()))
    return facts


# Lines of decoder.txt that change how a prompt is run, and such of the same length that do not.
CHANGED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"chunk": 2}, {"chunk": 9}),
    ({"chunk": 2, "length_thresholds": 4}, {"chunk": 2, "length_thresholds": 9}),
    ({"cache_resets": "8 11"}, {"cache_resets": "0 01"}),
    ({"chunk": 3, "cache_resets": "8 11"}, {"chunk": 3, "cache_resets": "0 01"}),
]


@pytest.mark.parametrize("kind", ["full", "static"])
def test_a_prompt_in_chunks_and_a_cache_computed_anew(kind, tmp_path):
    """Runs of other numbers of tokens bind other memory: allocations tell that they were made."""
    kit, expected = get_kit(CPP, kind), generate(PROMPTS)
    for pair in CHANGED:
        facts = [edit_facts(tmp_path, kind, **lines) for lines in pair]
        results = [run(kit, NUM_TOKENS, PROMPTS, facts=file) for file in facts]
        assert [rows for rows, _ in results] == [expected, expected]
        assert results[0][1] != results[1][1]


@functools.cache
def generate_with_settings() -> list[tuple[dict[str, Any], list[list[int]]]]:
    """Return lines of decoder.txt, and what eager generates with those settings."""
    plain = generate(PROMPTS)
    end, suppressed = plain[0][9], plain[1][6]
    found = [
        ({"eos_token_ids": f"{end} 95"}, generate(PROMPTS, eos_token_id=[end, 95])),
        ({"repetition_penalty": 1.5}, generate(PROMPTS, repetition_penalty=1.5)),
        ({"suppress_tokens": suppressed}, generate(PROMPTS, suppress_tokens=[suppressed])),
    ]
    assert plain not in [expected for _, expected in found]
    return found


def test_settings_of_the_model_are_applied(tmp_path):
    for changed, expected in generate_with_settings():
        facts = edit_facts(tmp_path, **changed)
        assert run(get_kit(CPP, "full"), NUM_TOKENS, PROMPTS, facts=facts)[0] == expected


# New tokens and prompts.
MISTAKES = [(1, [[5], [6, 96]]), (1, [[10**17]]), (1, [[5] * 99]), (60, [[5] * 9]), (0, [[5]])]


def refuse(bundle: Path, count: int, rows: list[list[int]]) -> str:
    """Return the error of the Python package."""
    with pytest.raises(RotaryExportError) as raised:
        load_decoder(bundle).generate(rows, max_new_tokens=count)
    return str(raised.value)


@pytest.mark.parametrize("kind", ["full", "static"])
@pytest.mark.parametrize(("count", "rows"), MISTAKES)
def test_mistakes_have_the_words_of_python(count, rows, kind):
    done = call(get_kit(CPP, kind), count, *(",".join(map(str, row)) for row in rows))
    check_refused(refuse(get_bundle(kind), count, rows), done)


def check_refused(message: str, done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    error, news = done.stderr.splitlines()
    assert error == f"error: {message}"
    assert news.endswith(" news")


@pytest.mark.parametrize("words", [("8", "5,x"), ("8", ""), ("8", "5,,6"), ("8", "-1"), ("x", "5")])
def test_words_that_are_no_integers(words):
    (bad,) = [part for word in words for part in word.split(",") if not part.isdigit()]
    check_refused(f"'{bad}' is not an integer >= 0", call(get_kit(CPP, "full"), *words))


def copy_with_settings(folder: Path, **changed: Any) -> Path:
    """Copy the bundle with another generation config."""
    bundle = Path(shutil.copytree(get_bundle("full"), folder / "bundle"))
    content = json.loads((bundle / "generation_config.json").read_text())
    (bundle / "generation_config.json").write_text(json.dumps(content | changed))
    update_hash(bundle, "generation_config.json")
    return bundle


def test_what_the_loop_does_not_run_is_refused(tmp_path):
    bundle = copy_with_settings(tmp_path, num_beams=4)
    why = refuse(bundle, 1, [[5]])
    check_refused(why, call(deploy(CPP, bundle, tmp_path / "kit"), 8, "5"))
    facts = tmp_path / "none.txt"
    why = "can't be read: deploy writes it for a model exported with its cache"
    check_refused(f"{facts} {why}", call(get_kit(CPP, "full"), 8, "5", facts=facts))
    facts.write_text("tokens input_ids")
    why = f"{facts} does not describe a decoder"
    check_refused(why, call(get_kit(CPP, "full"), 8, "5", facts=facts))
    usage = "usage: rotary_generate RUNTIME GRAPH.onnx decoder.txt MAX_NEW_TOKENS IDS... "
    check_refused(usage + "[--op-library FILE]", call(get_kit(CPP, "full"), 8))


def test_the_command_of_the_page():
    kit = get_kit(CPP, "full")
    page = (kit / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^build/rotary_generate .*", page, re.MULTILINE)[0]
    get_program()
    (kit / "ort").symlink_to(require(CPP) / NEWEST)
    (kit / "build" / "librotary_export.so").symlink_to(op_library_path())
    done = subprocess.run(["bash", "-c", command], cwd=kit, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_rows(done.stdout) == generate([[5, 6, 7], [8, 9]])


def test_the_loop_is_small():
    assert len((KITS / CPP / "generate.cc").read_text().splitlines()) <= 160


# ---- OpenVINO

RUN_OPENVINO = """
import json, sys
import generate
decoder = generate.Decoder(generate.read_facts())
facts, run, results, lengths = decoder.facts, decoder.run, [], []
decoder.run = lambda ids, past: lengths.append(len(ids)) or run(ids, past)
prompts, count, settings = json.loads(sys.argv[1])
for changed in settings:
    decoder.facts = facts | changed
    lengths.clear()
    rows = [decoder.generate(prompt, count) for prompt in prompts]
    results.append([rows, len(lengths)])
print(json.dumps(results))
print(decoder.describe())
"""
CHECK_OPENVINO = """
import json, sys
import generate
for count, rows in json.loads(sys.argv[1]):
    try:
        for row, prompt in enumerate(rows):
            generate.check(generate.read_facts(), row, prompt, count)
    except SystemExit as error:
        print(error)
"""


def run_openvino(kit: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(require(OPENVINO) / "bin" / "python"), "-B", *words]
    return subprocess.run(command, cwd=kit, capture_output=True, text=True, timeout=120)


def read_facts(changed: dict[str, Any]) -> dict[str, Any]:
    """Return changed lines of decoder.txt as the program reads them."""
    return {
        name: value
        if name in ("chunk", "repetition_penalty")
        else [int(word) for word in str(value).split()]
        for name, value in changed.items()
    }


@pytest.mark.parametrize("kind", ["full", "static"])
def test_openvino_generates_and_fuses(kind):
    plain = generate(PROMPTS)
    cases = [({}, plain), *((lines, plain) for lines, _ in CHANGED)]
    cases += generate_with_settings()
    words = json.dumps([PROMPTS, NUM_TOKENS, [read_facts(lines) for lines, _ in cases]])
    done = run_openvino(get_kit(OPENVINO, kind), "-c", RUN_OPENVINO, words)
    assert done.returncode == 0, done.stderr
    results, facts = done.stdout.splitlines()
    assert [rows for rows, _ in json.loads(results)] == [rows for _, rows in cases]
    runs = [
        count - len(PROMPTS) * NUM_TOKENS for _, count in json.loads(results)[: 1 + len(CHANGED)]
    ]
    assert runs == [0, 3, 1, 0, 11]  # more than one for each prompt and one for each further token
    found = re.fullmatch(r"OpenVINO ([\d.]+).*: (\d+) .* RoPE, (\d+) are a whole attention", facts)
    version, ropes, attentions = found.groups()
    assert (ropes, attentions) == ("5", "2")  # of two layers; one RoPE computes the tables
    if kind == "static":
        note = (
            f"{NUM_TOKENS} tokens, all those of model.generate; full and static cache; llama, two "
            f"layers: {ropes} RoPE ops in the compiled model, {attentions} that are an attention"
        )
        shapes = [f"1x{len(prompt)}" for prompt in PROMPTS]
        dtypes = ["float32"]
        record(
            TargetRun("OpenVINO", version, "decoder", "ran", "portable", dtypes, shapes, note=note)
        )


def test_openvino_the_command_of_the_page_and_mistakes(tmp_path):
    kit = get_kit(OPENVINO, "full")
    page = (kit / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^venv/bin/python (generate\.py .*)", page, re.MULTILINE)[1]
    done = run_openvino(kit, *command.split())
    assert done.returncode == 0, done.stderr
    assert read_rows(done.stdout) == generate([[5, 6, 7], [8, 9]])
    assert "tokens/s" in done.stderr
    done = run_openvino(kit, "generate.py", "8", "5,x")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "'x' is not an integer >= 0\n")
    bundle = copy_with_settings(tmp_path, num_beams=4)
    why = refuse(bundle, 1, [[5]])
    done = run_openvino(deploy(OPENVINO, bundle, tmp_path / "kit"), "generate.py", "8", "5")
    assert (done.returncode, done.stderr) == (1, f"{why}\n")


@pytest.mark.parametrize("kind", ["full", "static"])
def test_openvino_has_the_words_of_python(kind):
    done = run_openvino(get_kit(OPENVINO, kind), "-c", CHECK_OPENVINO, json.dumps(MISTAKES))
    assert done.stdout.splitlines() == [refuse(get_bundle(kind), *each) for each in MISTAKES]
