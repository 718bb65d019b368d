"""The kits for Node.js and for browsers generate what eager's `generate` does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.decoders import get_decoder
from helpers.javascript_kits import NEWEST, run_node
from helpers.target_runs import TargetRun, record, require
from helpers.text_decoders import (
    NUM_TOKENS,
    PROMPTS,
    TEXT,
    generate_rows,
    get_text_decoder,
    get_tokenizer,
)

from rotary_export.deploy.deploy import deploy

TRANSFORMERS_JS = "4.3.2"  # that setup_targets installs
AS_EAGER = f"generates {NUM_TOKENS} tokens, as transformers' generate"


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    """Deploy each bundle of text_decoders once for each target."""
    folder, made = tmp_path_factory.mktemp("kits"), {}

    def get_kit(target: str, kind: str) -> Path:
        if (target, kind) not in made:
            bundle = get_text_decoder(kind)[1]
            made[target, kind] = make_kit(target, bundle, folder / f"{target}-{kind}")
        return made[target, kind]

    return get_kit


def make_kit(target: str, bundle: Path, out: Path) -> Path:
    kit = deploy(target, bundle, out)
    (kit / "node_modules").symlink_to(require(target) / "node_modules")
    return kit


def generate(kit: Path, *words: Any) -> dict[str, Any]:
    done = run_node("node", kit, "generate.mjs", "--json", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def name_ids(prompts) -> list[str]:
    return [word for row in prompts for word in ("--ids", ",".join(map(str, row)))]


def record_tokens(target: str, version: str, lengths, note: str = AS_EAGER) -> None:
    shapes = [f"{rows}x{length}" for rows, length in lengths]
    record(
        TargetRun(
            target, version, "decoder", "ran", "portable", ["float32"], shapes, None, False, note
        )
    )


# ---- Node.js


@pytest.mark.parametrize("kind", ["full", "static", "data"])
def test_node_generates_what_eager_does(kind, kits):
    """Two prompts of different lengths: rows are padded, left or (static) right."""
    expected = generate_rows(get_text_decoder(kind)[0], PROMPTS, NUM_TOKENS)
    found = generate(kits("node", kind), *name_ids(PROMPTS), "--max-new-tokens", NUM_TOKENS)
    assert found["ids"] == expected
    assert found["text"] is None
    assert found["tokens_per_second"] > 0
    if kind == "full":
        record_tokens("Node.js", f"onnxruntime-node {NEWEST}", [(2, 5)])


def test_node_streams_text(kits):
    model, bundle = get_text_decoder("full")
    tokenizer = get_tokenizer(bundle)
    prompt = tokenizer.encode(TEXT).ids
    (row,) = generate_rows(model, [prompt], NUM_TOKENS)
    words = ("--prompt", TEXT, "--max-new-tokens", NUM_TOKENS)
    assert generate(kits("node", "full"), *words) | {"tokens_per_second": 0} == {
        "ids": [row],
        "text": [tokenizer.decode(row[len(prompt) :])],
        "tokens_per_second": 0,
    }
    done = run_node("node", kits("node", "full"), "generate.mjs", *words)
    text, speed = done.stdout.split("\n")[:2]
    assert text == tokenizer.decode(row[len(prompt) :])
    assert speed.startswith(f"{len(row) - len(prompt)} tokens in ")


@pytest.mark.filterwarnings("ignore:longrope changes")
def test_a_cache_is_computed_anew_where_transformers_does(tmp_path):
    """phi3 drops its cache at `original_max_position_embeddings`, 24."""
    model, bundle = get_decoder("phi3")
    kit = make_kit("node", bundle, tmp_path / "kit")
    prompts = [[*range(5, 25)]]
    found = generate(kit, *name_ids(prompts), "--max-new-tokens", NUM_TOKENS)
    assert found["ids"] == generate_rows(model, prompts, NUM_TOKENS)
    assert len(found["ids"][0]) > 26  # past the length


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ids", "5,96"), "token ids must be in [0, 96), got 96 in prompt 0"),
        (("--ids", "5,x"), "token ids must be in [0, 96), got NaN in prompt 0"),
        (("--ids", "5", "--max-new-tokens", 0), "maxNewTokens must be an integer >= 1, got 0"),
        (("--ids", "5", "--max-new-tokens", 99), "prompt and new tokens must be <= 65, got 1 + 99"),
        (("--prompt", ""), "prompt 0 must have tokens, got none"),
    ],
)
def test_mistakes(words, message, kits):
    done = run_node("node", kits("node", "full"), "generate.mjs", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {message}\n"


@pytest.mark.filterwarnings("ignore:longrope changes")
def test_damaged_weights_and_what_a_bundle_lacks(kits, tmp_path):
    kit = Path(shutil.copytree(kits("node", "data"), tmp_path / "kit", symlinks=True))
    with (kit / "bundle" / "onnx" / "model.onnx_data").open("ab") as file:
        file.write(b"\0")
    done = run_node("node", kit, "generate.mjs", "--ids", "5")
    assert done.stderr.startswith("error: onnx/model.onnx_data is not the file that was exported")
    plain = make_kit("node", get_decoder("phi3")[1], tmp_path / "plain")
    done = run_node("node", plain, "generate.mjs", "--prompt", "a")
    assert done.stderr == "error: the bundle has no tokenizer.json: pass token ids\n"
    done = run_node("node", plain, "generate.mjs")
    assert done.returncode == 2
    assert done.stderr.startswith("error: pass --prompt or --ids\nusage: node generate.mjs")


TRANSFORMERS_PROGRAM = """
import path from "node:path";
import { env, pipeline } from "@huggingface/transformers";
const [bundles, text, max_new_tokens] = JSON.parse(process.argv[2]);
env.allowRemoteModels = false;
const all = [];
for (const [folder, options] of bundles) {
  env.localModelPath = path.dirname(folder);
  const generator = await pipeline("text-generation", path.basename(folder), options);
  const made = await generator.model.generate({ ...generator.tokenizer(text), max_new_tokens });
  const [{ generated_text }] = await generator(text, { max_new_tokens });
  all.push([made.tolist()[0].map(Number), generated_text]);
}
console.log(JSON.stringify(all));
"""


def test_transformers_js_opens_kits_and_bundles(kits, tmp_path):
    model, bundle = get_text_decoder("full")
    flat = {"subfolder": "", "dtype": "fp32"}
    opened = [
        (str(kits("node", "full") / "bundle"), {}),
        (str(kits("browser", "data") / "bundle"), {}),  # weights beside the graph
        (str(bundle), flat),
        (str(get_text_decoder("data")[1]), flat | {"use_external_data_format": True}),
    ]
    (tmp_path / "program.mjs").write_text(TRANSFORMERS_PROGRAM)
    (tmp_path / "node_modules").symlink_to(require("node") / "transformers" / "node_modules")
    done = run_node("node", tmp_path, "program.mjs", json.dumps([opened, TEXT, NUM_TOKENS]))
    assert done.returncode == 0, done.stderr
    tokenizer = get_tokenizer(bundle)
    (row,) = generate_rows(model, [tokenizer.encode(TEXT).ids], NUM_TOKENS)
    assert json.loads(done.stdout) == [[row, tokenizer.decode(row)]] * len(opened)
    record_tokens("transformers.js", TRANSFORMERS_JS, [(1, len(TEXT))])


def test_the_page_of_the_kit(kits, tmp_path):
    """Its command runs, and its program, with the package that it installs."""
    kit = Path(shutil.copytree(kits("node", "full"), tmp_path / "kit", symlinks=True))
    page = (kit / "README.md").read_text(encoding="utf-8")
    assert f"@huggingface/transformers@{TRANSFORMERS_JS}" in page
    command = re.search(r"^node (generate\.mjs .*)$", page, re.MULTILINE)[1]
    assert run_node("node", kit, *command.split()).returncode == 0
    program = re.search(r"```js\n(.*?)```", page, re.DOTALL)[1]
    (kit / "program.mjs").write_text(program)
    (kit / "node_modules").unlink()
    (kit / "node_modules").symlink_to(require("node") / "transformers" / "node_modules")
    done = run_node("node", kit, "program.mjs")
    assert done.returncode == 0, done.stderr
    model, bundle = get_text_decoder("full")
    tokenizer = get_tokenizer(bundle)
    prompt = tokenizer.encode("Once upon a time").ids
    assert done.stdout == tokenizer.decode(generate_rows(model, [prompt], NUM_TOKENS)[0]) + "\n"


# ---- browser


def open_page(kit: Path, *words: Any) -> dict[str, Any]:
    done = run_node("browser", kit, "check.mjs", *words)
    assert done.stderr == ""
    (report,) = map(json.loads, done.stdout.splitlines())
    return report


def test_the_page_streams_text(kits):
    model, bundle = get_text_decoder("data")
    tokenizer = get_tokenizer(bundle)
    prompt = tokenizer.encode(TEXT).ids
    (row,) = generate_rows(model, [prompt], NUM_TOKENS)
    words = ("--prompt", TEXT, "--max-new-tokens", NUM_TOKENS)
    report = open_page(kits("browser", "data"), *words)
    assert report["state"] == "passed", report
    text = tokenizer.decode(row[len(prompt) :])
    made = report["generated"]
    assert (made["ids"], made["text"], "".join(made["pieces"])) == (row, text, text)
    assert len(made["pieces"]) == len(row) - len(prompt)
    chromium = report["chromium"].split(".")[0]
    version = f"onnxruntime-web {NEWEST}, Chromium {chromium}"
    record_tokens("browser", version, [(1, len(TEXT))], f"WebAssembly; {AS_EAGER}")


def test_the_page_generates_ids_with_a_static_cache(kits):
    model, _ = get_text_decoder("static")
    words = ("--ids", ",".join(map(str, PROMPTS[0])), "--max-new-tokens", NUM_TOKENS)
    report = open_page(kits("browser", "static"), *words)
    assert report["state"] == "passed", report
    assert [report["generated"]["ids"]] == generate_rows(model, PROMPTS[:1], NUM_TOKENS)
    assert report["generated"]["text"] is None


def test_the_page_shows_a_mistake(kits):
    report = open_page(kits("browser", "full"), "--ids", "5,96")
    assert report["state"] == "error"
    assert report["verdict"] == "token ids must be in [0, 96), got 96 in prompt 0"
