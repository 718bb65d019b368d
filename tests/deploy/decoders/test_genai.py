"""onnxruntime-genai: the folder that deploy writes, and bundles that it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.bundles import check_refused, edit_manifest, get_bundle, update_hash
from helpers.text_bundles import get_text_decoder

from rotary_export.bundle.manifest import read_manifest
from rotary_export.deploy.deploy import KITS, deploy
from rotary_export.op.library import LIBRARY_NAME


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(get_text_decoder().bundle, tmp_path / "bundle")


def edit_decoder(bundle, **changed):
    config = read_manifest(bundle).config
    edit_manifest(bundle, config=config | {"decoder": config["decoder"] | changed})


def edit_json(bundle, name, **changed):
    """Change a JSON file, and its hash in the manifest."""

    content = json.loads((bundle / name).read_text()) | changed
    (bundle / name).write_text(json.dumps(content))
    update_hash(bundle, name)


def read_config(kit):
    return json.loads((kit / "genai_config.json").read_text())


def refuse(message, bundle, tmp_path):
    check_refused(message, lambda: deploy("genai", bundle, tmp_path / "kit"), tmp_path)


def test_the_config_is_that_of_the_graph(bundle, tmp_path):
    kit = deploy("genai", bundle, tmp_path / "kit")
    config = read_config(kit)
    model, decoder = config["model"], config["model"]["decoder"]
    names = {file.name for file in kit.iterdir()}
    assert {LIBRARY_NAME, "tokenizer.json", "tokenizer_config.json"} <= names
    assert {file.name for file in (KITS / "genai").iterdir()} - {"__pycache__"} <= names
    assert (kit / decoder["filename"]).is_file()
    assert (model["vocab_size"], model["context_length"]) == (96, 64)
    tokens = {name: model[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    assert tokens == {"bos": 1, "eos": [2], "pad": 0}
    sizes = ("num_hidden_layers", "num_key_value_heads", "head_size", "num_attention_heads")
    assert [decoder[name] for name in sizes] == [2, 2, 16, 4]
    assert "past_sequence_length" not in decoder["inputs"]


def test_the_settings_of_a_search_are_kept(bundle, tmp_path):
    edit_json(bundle, "generation_config.json", repetition_penalty=1.2, eos_token_id=[2, 5])
    edit_json(bundle, "generation_config.json", pad_token_id=None, do_sample=True)
    edit_json(bundle, "config.json", pad_token_id=None)
    edit_decoder(bundle, length_thresholds=[24])
    config = read_config(deploy("genai", bundle, tmp_path / "kit"))
    assert config["search"]["repetition_penalty"] == 1.2
    assert config["search"]["do_sample"] is False
    assert config["search"]["max_length"] == config["model"]["context_length"] == 24
    assert config["model"]["eos_token_id"] == [2, 5]
    assert config["model"]["pad_token_id"] == 2


def test_refuses_graphs_without_a_full_cache(bundle, tmp_path):
    refuse("genai needs a causal language model with a cache, got", get_bundle("plain"), tmp_path)
    edit_decoder(bundle, cache="static")
    refuse("genai needs cache 'full', got 'static'", bundle, tmp_path)
    edit_decoder(bundle, cache="window")
    refuse("genai needs a cache whose layers have one length", bundle, tmp_path)


def test_refuses_the_last_logits(bundle, tmp_path):
    edit_decoder(bundle, logits="last")
    refuse("each row at its own length), got those of the last", bundle, tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_refuses_a_bundle_without_its_files(name, bundle, tmp_path):
    files = {key: value for key, value in read_manifest(bundle).files.items() if key != name}
    edit_manifest(bundle, files=files)
    (bundle / name).unlink()
    refuse(f"genai needs {name} in the bundle, got none", bundle, tmp_path)


def test_refuses_a_config_without_an_end(bundle, tmp_path):
    for name in ("config.json", "generation_config.json"):
        edit_json(bundle, name, eos_token_id=None)
    refuse("genai needs eos_token_id in generation_config.json", bundle, tmp_path)
