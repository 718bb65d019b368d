"""The bundle of a decoder: a cache by default, the files beside the graph, their hashes."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from helpers.tiny_models import make_model

import rotary_export
from rotary_export.bundle.manifest import read_manifest
from rotary_export.cli.main import cli
from rotary_export.deploy.deploy import deploy
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.models.decoder.files import write_model_files

PATH = "/home/somebody/models/llama"
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizerFast",
    "name_or_path": PATH,
    "auto_map": {"A": "a.B"},
}
COPIED = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "merges.txt": "a b"}
CODE = {"modeling_llama.py": "raise SystemExit", "pytorch_model.bin": "pickle", "README.md": "# A"}


@pytest.fixture(scope="module")
def model():
    return make_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The folder of a model, as it may have been saved years ago."""
    path = tmp_path_factory.mktemp("saved") / "llama"
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"_name_or_path": PATH, "torch_dtype": "bfloat16", "kept": 1})
    )
    (path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    for name, text in (COPIED | CODE).items():
        (path / name).write_text(text)
    return path


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "llama"
    arguments = ["export-model", str(folder), "--format", "onnx", "--quick", "--out", str(out)]
    done = CliRunner().invoke(cli, [*arguments, "--last-logits"])
    assert done.exit_code == 0, done.output
    return out


def test_a_folder_is_exported_with_its_cache(bundle):
    manifest = read_manifest(bundle)
    graph = manifest.graphs["model"]
    assert [info.name for info in graph.inputs] == [
        "input_ids", "attention_mask", "position_ids",
        "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    assert [(info.name, info.shape) for info in graph.outputs] == [
        ("logits", ("batch_size", 1, 96)),
        ("present.0.key", ("batch_size", 2, "past_seq_len + seq_len", 16)),
        ("present.0.value", ("batch_size", 2, "past_seq_len + seq_len", 16)),
    ]
    assert manifest.config["last_logits"]
    assert manifest.config["decoder"] == {
        "cache": "full",
        "num_layers": 1,
        "logits": "last",
        "max_cache_len": None,
        "length_thresholds": [],
        "max_positions": 64,
    }


def test_the_files_of_the_folder(bundle, folder):
    cleaned = {"config.json", "generation_config.json", "tokenizer_config.json"}
    assert read_manifest(bundle).files.keys() == {"model.onnx", *cleaned, *COPIED}
    for name, text in COPIED.items():
        assert (bundle / name).read_text() == text
    config = json.loads((bundle / "config.json").read_text())
    assert (config["torch_dtype"], config["kept"]) == ("float32", 1)
    assert json.loads((bundle / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "LlamaTokenizerFast"
    }
    texts = [file.read_bytes() for file in bundle.iterdir() if file.suffix == ".json"]
    assert not any(b"/home/" in text or str(folder).encode() in text for text in texts)


def test_the_model_is_verified_again(bundle, folder):
    arguments = ["verify", str(bundle), "--model", str(folder), "--case", "the example"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output


def test_a_changed_file_is_refused(bundle):
    file = bundle / "tokenizer.json"
    text = file.read_text()
    try:
        file.write_text("{} ")
        with pytest.raises(CheckFailedError, match=r"tokenizer\.json .* is not the file"):
            rotary_export.verify(bundle)
        file.unlink()
        with pytest.raises(CheckFailedError, match=r"tokenizer\.json is missing"):
            deploy("node", bundle, bundle.parent / "kit")
    finally:
        file.write_text(text)


def test_a_kit_contains_the_files(bundle, tmp_path):
    kit = deploy("cpp-onnxruntime", bundle, tmp_path / "kit")
    assert {file.name for file in (kit / "bundle").iterdir()} == {
        "manifest.json", *read_manifest(bundle).files,
    }  # fmt: skip


def test_a_model_without_a_folder_has_its_configs(model, tmp_path):
    assert write_model_files(model, None, tmp_path, "float16") == []
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float16")
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    assert len([*tmp_path.iterdir()]) == 2


def test_a_config_that_is_no_json_is_left_out(model, tmp_path, monkeypatch):
    def fail():
        raise TypeError("Object of type Tensor is not JSON serializable")

    monkeypatch.setattr(model.config, "to_json_string", fail, raising=False)
    (note,) = write_model_files(model, None, tmp_path, "float32")
    assert note == (
        "without config.json: it can't be written: Object of type Tensor is not JSON serializable"
    )


def test_a_folder_must_be_one(model, tmp_path):
    with pytest.raises(RotaryExportError, match=r"model_folder must be a folder, got '.*/none'"):
        rotary_export.export_model(
            model, None, tmp_path / "b", model_folder=tmp_path / "none", quick=True
        )
