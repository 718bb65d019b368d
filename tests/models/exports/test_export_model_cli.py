"""`rotary-export export-model`: its sources, what it prints, and one clear error each."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.planted import plant_fault
from helpers.tiny_models import make_config, make_model

import rotary_export
from rotary_export.bundle.manifest import read_manifest
from rotary_export.cli.main import cli
from rotary_export.models.source import load_source

FACTORIES = """
import torch
from helpers.tiny_models import make_inputs, make_model

def llama():
    model = make_model("llama", num_hidden_layers=1)
    return model, make_inputs(model)

def deep():
    model = make_model("llama", num_hidden_layers=2)
    return model, make_inputs(model)

def alone():
    return make_model("llama", num_hidden_layers=1)

def plain():
    return torch.nn.Linear(2, 2), {"input": torch.ones(3, 2)}

def rotate_masked(x):
    return x * torch.arange(x.shape[1])[:, None] * (torch.arange(16) % 3 > 0)

class Masked(torch.nn.Module):
    def forward(self, x):
        return rotate_masked(x)

def masked():
    return Masked(), {"x": torch.ones(2, 6, 16)}

def broken():
    raise KeyError("weights")

def quits():
    raise SystemExit(0)

def wrong():
    return 3

def without_inputs():
    return torch.nn.Linear(2, 2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a factory module, a Hugging Face folder and configs."""
    root = tmp_path_factory.mktemp("sources")
    (root / "my_factories.py").write_text(FACTORIES)
    (root / "half_written.py").write_text("import no_such_package\n")
    make_model("llama", num_hidden_layers=1).save_pretrained(root / "saved")
    config = make_config("llama", num_hidden_layers=1).to_dict()

    def write(name, **changed):
        (root / name).write_text(json.dumps(config | changed))

    write("config.json", architectures=["LlamaForCausalLM"])
    write("unknown_type.json", rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    write("missing_key.json", rope_parameters={"rope_type": "linear", "rope_theta": 1e4})
    write("zero_base.json", rope_theta=0)
    write("word_for_a_base.json", rope_theta="abc")
    write("word_for_a_size.json", hidden_size="abc")
    write("unknown_model.json", model_type="lama", auto_map={"AutoModel": "its.own.Code"})
    (root / "empty.json").write_text("{}")
    (root / "text.json").write_text("not json")
    (root / "no_weights").mkdir()
    (root / "no_weights" / "config.json").write_text((root / "config.json").read_text())
    (root / "no_weights" / "pytorch_model.bin").write_bytes(b"")
    (root / "no_config").mkdir()
    return root


def test_loading_prints_nothing(folder, capfd):
    load_source(str(folder / "saved"))
    assert capfd.readouterr() == ("", "")


def run(folder, monkeypatch, source, *options, formats=("onnx",)):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    arguments = ["export-model", source, "--out", str(folder / "out"), *options]
    for kind in formats:
        arguments += ["--format", kind]
    return CliRunner().invoke(cli, arguments)


@pytest.mark.parametrize("source", ["my_factories:llama", "my_factories:alone", "saved"])
def test_exports(folder, monkeypatch, source):
    result = run(folder, monkeypatch, source, "--force")
    assert result.exit_code == 0, result.output
    assert "modeling_llama.apply_rotary_pos_emb" in result.stdout
    assert "half, channels 0 to 16, BNSH" in result.stdout
    assert "comparisons with eager PyTorch, all within tolerance" in result.stdout
    assert "random" not in result.stdout
    assert read_manifest(folder / "out").graphs["model"].rotary_nodes == 1


def test_config_reports_that_weights_are_random(folder, monkeypatch):
    result = run(folder, monkeypatch, "config.json", "--force", "--json", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["note"] == "the weights are random: there is only a config"
    assert found["rotary"][0]["fused"] == 1
    assert found["parity"]["passed"]
    assert read_manifest(folder / "out").dtype == "float16"


def call(folder, monkeypatch, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return CliRunner().invoke(cli, arguments)


def test_a_failure_prints_the_command_that_repeats_it(folder, monkeypatch):
    kept = folder / "kept"
    with plant_fault():
        result = run(
            folder, monkeypatch, "my_factories:deep", "--force", "--quick", "--seed", "2",
            "--keep-failed", str(kept),
        )  # fmt: skip
        assert result.exit_code == 1
        command = shlex.split(result.stderr.rpartition("to repeat it: ")[2].strip())
        assert command[:3] == ["rotary-export", "export-model", "my_factories:deep"]
        assert command[3:6] == ["--format", "onnx", "--quick"]
        assert command[-2:] == ["--seed", "2"]
        before = sorted(folder.iterdir())
        again = call(folder, monkeypatch, *command[1:])
        assert again.exit_code == 1
        assert "rotary call 3 of 4" in again.stderr
        assert sorted(folder.iterdir()) == before
    right = call(folder, monkeypatch, *command[1:])
    assert right.exit_code == 0, right.output
    assert f"model was compared at {command[-3]}\n" in right.stdout
    wrong = call(folder, monkeypatch, "verify", str(kept), "--model", "my_factories:deep")
    assert wrong.exit_code == 1
    assert "FAILED" in wrong.stdout
    refused = call(
        folder, monkeypatch, "run", str(kept), "--input", "input_ids=1", "--out", "o.npz"
    )
    assert refused.exit_code == 1
    assert "failed its proof" in refused.stderr


def test_verify_with_the_model(folder, monkeypatch):
    assert run(folder, monkeypatch, "my_factories:deep", "--force", "--quick").exit_code == 0
    options = ["--model", "my_factories:deep", "--seed", "1", "--case", "the example", "--json"]
    result = call(folder, monkeypatch, "verify", str(folder / "out"), *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["shapes"] == {"model": ["the example"]}
    alone = call(folder, monkeypatch, "verify", str(folder / "out"), "--case", "the example")
    assert alone.exit_code == 2
    assert "--case needs --model." in alone.stderr


def run_dry(folder, monkeypatch, source, *options):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    before = sorted(folder.iterdir())
    result = CliRunner().invoke(cli, ["export-model", source, "--dry-run", *options])
    left = [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"]
    assert left == [path for path in before if path.name != "__pycache__"]
    return result


def test_dry_run(folder, monkeypatch):
    result = run_dry(folder, monkeypatch, "my_factories:llama")
    assert result.exit_code == 0, result.output
    assert "modeling_llama.apply_rotary_pos_emb  1      1      half, channels" in result.stdout
    assert result.stdout.rstrip().endswith("LlamaForCausalLM: 1 of 1 rotary calls would be fused")


def test_dry_run_as_json(folder, monkeypatch):
    options = ["--json", "--out", str(folder / "never"), "--dtype", "float16"]
    result = run_dry(folder, monkeypatch, "config.json", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["model"], found["calls"], found["fused"]) == ("LlamaForCausalLM", 1, 1)
    assert found["note"] == "the weights are random: there is only a config"
    (finding,) = found["rotary"]
    assert finding["rotation"] == "half, channels 0 to 16, BNSH"
    assert finding["reason"] == ""


def test_dry_run_of_a_model_without_rotary_calls(folder, monkeypatch):
    result = run_dry(folder, monkeypatch, "my_factories:plain", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["calls"], found["fused"], found["rotary"]) == (0, 0, [])


def test_dry_run_reports_why_a_call_is_not_replaced(folder, monkeypatch):
    result = run_dry(folder, monkeypatch, "my_factories:masked")
    assert result.exit_code == 1
    assert "in no layout does the op equal it on random inputs" in result.stdout
    last = result.stdout.rstrip().rpartition("\n")[2]
    assert last.startswith("Masked: 0 of 1 rotary calls would be fused; an export looks for inline")


def test_out_or_dry_run_is_required(folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(cli, ["export-model", "my_factories:llama"])
    assert result.exit_code == 2
    assert "Missing option '--out', '--dry-run' or '--case'." in result.stderr


def test_other_commands_accept_the_bundle(folder, monkeypatch):
    assert run(folder, monkeypatch, "my_factories:llama", "--force").exit_code == 0
    out = str(folder / "out")
    result = CliRunner().invoke(cli, ["verify", out])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli, ["inspect", out])
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM" in result.stdout
    assert "\nthe example " in result.stdout
    result = CliRunner().invoke(cli, ["bench", out, "--shape", "1", "8", "--seconds", "0"])
    assert result.exit_code == 0, result.output
    assert "fused" in result.stdout
    ids = np.arange(6).reshape(2, 3)
    np.savez(folder / "inputs.npz", input_ids=ids, attention_mask=ids * 0 + 1, position_ids=ids % 3)
    command = ["run", out, "--input", str(folder / "inputs.npz"), "--out", str(folder / "o.npz")]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("model ran on CPUExecutionProvider: fused")
    result = CliRunner().invoke(cli, [*command, "--force", "--json"])
    assert json.loads(result.stdout)["graph"] == "model"
    assert rotary_export.load(out).graph_name == "model"


@pytest.mark.parametrize("option", [[], ["--json"]], ids=["plain", "json"])
def test_lists_of_a_manifest_are_shown(folder, monkeypatch, option):
    assert run(folder, monkeypatch, "my_factories:llama", "--force", "--quick").exit_code == 0
    path = folder / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"] |= {"length_thresholds": [16, 64], "unverified": ["s < 9"]}
    path.write_text(json.dumps(manifest))
    result = CliRunner().invoke(cli, ["inspect", str(folder / "out"), *option])
    assert result.exit_code == 0, result.output
    if option:
        assert json.loads(result.stdout)["length_thresholds"] == [16, 64]
    else:
        assert "length_thresholds: 16, 64\nmax_positions" in result.stdout
        assert "unverified: s < 9" in result.stdout


BAD = {
    "no such module": ("no_module:f", "no_module can't be imported: ModuleNotFoundError", 2),
    "module that fails": ("half_written:f", "half_written can't be imported: ModuleNotFound", 2),
    "no such function": ("my_factories:nothing", "my_factories has no function 'nothing'", 2),
    "factory that raises": ("my_factories:broken", "broken() raises KeyError: 'weights'", 2),
    "factory that exits": ("my_factories:quits", "quits() raises SystemExit: 0", 2),
    "factory of no model": ("my_factories:wrong", "must return a torch.nn.Module", 2),
    "no example inputs": ("my_factories:without_inputs", "must return example inputs too", 2),
    "no rotary": ("my_factories:plain", "Linear applies no rotary embedding", 1),
    "nothing": ("nothing", "SOURCE must be package.module:factory", 2),
    "no such config": ("there/config.json", "there/config.json does not exist", 2),
    "no json": ("text.json", "text.json is not valid JSON", 2),
    "no config": ("empty.json", "is not a config of a Hugging Face model: it has no model_type", 2),
    "unknown rope type": ("unknown_type.json", "unknown_type.json: ", 2),
    "missing rope key": ("missing_key.json", "missing_key.json: ", 2),
    "base of 0": ("zero_base.json", "zero_base.json: rope_theta must be a number > 0 and", 2),
    "base of no number": ("word_for_a_base.json", "< 1e30, got 'abc' in the config", 2),
    "size of no number": ("word_for_a_size.json", "field 'hidden_size': TypeError: Field", 2),
    "unknown model": ("unknown_model.json", "has no model_type 'lama' (it has code of its own", 2),
    "no safetensors": ("no_weights", "no_weights has no .safetensors file", 2),
    "folder without config": ("no_config", "no_config/config.json does not exist", 2),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_one_clear_error(folder, monkeypatch, case):
    source, message, code = case
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    out = folder / "new"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    result = CliRunner().invoke(cli, ["export-model", source, "--out", str(out)])
    assert message in result.stderr, result.output
    assert result.exit_code == code
    assert result.stderr.count("rotary-export: ") == 1
    assert "Traceback" not in result.output
    assert not out.exists()
