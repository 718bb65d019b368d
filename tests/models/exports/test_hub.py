"""A model of the Hugging Face hub, fetched by the real client from a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers.hub_server import MODEL, name_commit, serve_hub
from helpers.tiny_models import make_model

from rotary_export.bundle.manifest import read_manifest
from rotary_export.models.hub import is_hub_id

CODE = b"raise SystemExit('code of the hub was run')\n"
NOT_FETCHED = {
    "pytorch_model.bin": b"a pickle",
    "modeling_llama.py": CODE,
    "consolidated.safetensors": b"again",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"another",
    "README.md": b"# Tiny",
}
TOKENIZER = ["merges.txt", "tokenizer.json", "tokenizer.model"]
FETCHED = sorted(["config.json", "generation_config.json", "model.safetensors", *TOKENIZER])


@pytest.fixture(scope="module")
def revisions(tmp_path_factory):
    """A model of one layer on `main`, of two on `v2`."""
    revisions = {}
    for name, layers in (("main", 1), ("v2", 2)):
        folder = tmp_path_factory.mktemp(name)
        make_model("llama", num_hidden_layers=layers).save_pretrained(folder)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        files |= {name: name.encode() for name in TOKENIZER}  # different: equal ones are sent once
        revisions[name] = files | NOT_FETCHED
    return revisions


def run(url, folder, *arguments, **environment):
    """Run the command in a process of its own: the client reads HF_ENDPOINT when it is imported."""
    (folder / "cwd").mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "rotary_export", "export-model", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder / "cwd",
        env=kept
        | {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "NO_PROXY": "*"}
        | environment,
    )


def test_a_model_is_fetched_without_code(revisions, tmp_path):
    with serve_hub(revisions) as hub:
        done = run(hub.url, tmp_path, MODEL, "--out", "b", "--format", "onnx", "--quick")
        assert done.returncode == 0, done.stderr
        assert sorted(hub.fetched) == FETCHED
        assert f"note: {MODEL} at commit {name_commit('main')}\n" in done.stdout
        assert f"load {MODEL}\n" in done.stderr
        assert "Fetching" not in done.stderr  # no bar of the client
        assert read_manifest(tmp_path / "cwd" / "b").graphs["model"].rotary_nodes == 1

        # What was fetched is found again, with the network and without.
        for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
            again = run(hub.url, tmp_path, MODEL, "--dry-run", "--json", **offline)
            assert again.returncode == 0, again.stderr
            assert json.loads(again.stdout)["fused"] == 1
        assert sorted(hub.fetched) == FETCHED


@pytest.mark.parametrize("revision", ["v2", name_commit("v2")], ids=["branch", "commit"])
def test_a_revision_is_fetched(revisions, tmp_path, revision):
    with serve_hub(revisions) as hub:
        done = run(hub.url, tmp_path, MODEL, "--dry-run", "--json", "--revision", revision)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fused"] == 2
    assert found["note"] == f"{MODEL} at commit {name_commit('v2')}"


def test_offline_the_message_names_the_command_that_fetches(tmp_path):
    for url, offline in (
        ("http://127.0.0.1:9", {}),  # nothing listens there
        ("http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"}),
    ):
        done = run(url, tmp_path, MODEL, "--out", "b", "--revision", "v2", **offline)
        assert done.returncode == 2
        error = done.stderr.splitlines()[-1]
        assert error.startswith(
            f"rotary-export: {MODEL} can't be fetched from the Hugging Face hub, and no such "
            "folder exists: "
        )
        assert f"hf download {MODEL} --revision v2 --include '*.safetensors'" in error
        assert error.endswith("--local-dir FOLDER; then name FOLDER")
        assert list((tmp_path / "cwd").iterdir()) == []


REFUSED = {
    "no model": (("acme/none",), False, "the hub has no such model, or it is private"),
    "no revision": ((MODEL, "--revision", "v3"), False, "it has no revision 'v3'"),
    "gated": ((MODEL,), True, "its licence must be accepted on its page; then log in by `hf auth"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_the_hub_refuses_is_one_sentence(revisions, tmp_path, case):
    arguments, gated, message = case
    with serve_hub(revisions, gated=gated) as hub:
        done = run(hub.url, tmp_path, *arguments, "--out", "b")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cwd" / "b").exists()


def test_a_revision_needs_a_model_of_the_hub(tmp_path):
    done = run("http://127.0.0.1:9", tmp_path, "module:make", "--dry-run", "--revision", "v2")
    assert done.returncode == 2
    assert "revision is for a model on the hub, org/name, got 'module:make'" in done.stderr


def test_what_is_taken_for_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_hub_id("HuggingFaceTB/SmolLM2-135M")
    for source in ("llama", "models/llama", "./llama", "a/b/c", "a/config.json", "a b/c", "/tmp/x"):
        assert not is_hub_id(source), source
