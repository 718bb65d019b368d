"""`rotary-export export --hf-config`."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.oracles import rotate_eagerly
from helpers.rope_cases import BOUNDARY, BUNDLES, HALF
from helpers.scaled_bundles import SIZES, make_inputs, make_values

import rotary_export
from rotary_export.cli.main import cli
from rotary_export.rope import ScaledRotaryEmbedding, read_rope


def run_cli(*arguments):
    return CliRunner().invoke(cli, ["export", *map(str, arguments), "--json"])


def write_config(folder, values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(("name", "rows"), [("yarn", BOUNDARY), ("dynamic", 3 * BOUNDARY)])
def test_command_line(tmp_path, name, rows):
    """Heads, sizes and layout are the config's; dynamic reaches as far as its factor."""
    path = write_config(tmp_path, make_values(name))
    result = run_cli("--hf-config", path, "--out", tmp_path / "b", "--format", "onnx")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    config = manifest["config"]
    assert (config["num_heads"], config["num_kv_heads"], config["head_dim"]) == (4, 2, 2 * HALF)
    assert (config["max_seq_len"], config["interleaved"]) == (rows, False)
    assert config["rope"]["rope_type"] == BUNDLES[name]["rope_type"]
    assert manifest["parity"]["passed"]
    session = rotary_export.load(tmp_path / "b")
    inputs = {key: value.numpy() for key, value in make_inputs(name, BOUNDARY).items()}
    assert session(**inputs)["query_out"].shape == (3, 4, 5, 2 * HALF)
    inspected = CliRunner().invoke(cli, ["inspect", str(tmp_path / "b")])
    assert inspected.exit_code == 0
    assert BUNDLES[name]["rope_type"] in inspected.output


def test_command_line_layouts(tmp_path):
    cohere = write_config(tmp_path, make_values("default") | {"model_type": "cohere"})
    only = ("--hf-config", cohere, "--format", "onnx")
    assert run_cli(*only, "--out", tmp_path / "a").exit_code == 0
    assert json.loads((tmp_path / "a/manifest.json").read_text())["config"]["interleaved"]
    arguments = ("--max-seq-len", 8, "--num-heads", 2, "--num-kv-heads", 1, "--half")
    result = run_cli(*only, "--out", tmp_path / "b", *arguments)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "b/manifest.json").read_text())["config"]
    assert (config["interleaved"], config["max_seq_len"]) == (False, 8)
    assert (config["num_heads"], config["num_kv_heads"]) == (2, 1)


LAYERS = {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": None}


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        (make_values("yarn"), ("--dim", 8), "export needs one of --dim and --hf-config"),
        (make_values("yarn"), ("--base", 5), "--base is for --dim"),
        (make_values("yarn"), ("--layer-type", "a"), "layer_type must be left out"),
        (SIZES | {"rope_parameters": LAYERS}, (), "layer_type must be one of full_attention"),
        (
            SIZES | {"rope_parameters": LAYERS},
            ("--layer-type", "sliding_attention"),
            "have no rotary embedding (NoPE)",
        ),
        (
            make_values("yarn") | {"model_type": "mine"},
            (),
            "layout of its model_type is not known: pass --interleaved or --half",
        ),
        (make_values("yarn") | {"rope_parameters": {"rope_type": "x"}}, (), "got 'x' in the rope"),
    ],
    ids=["both", "base", "layer", "layers", "nope", "layout", "type"],
)
def test_command_line_refuses(tmp_path, values, arguments, message):
    path = write_config(tmp_path, values)
    result = run_cli("--hf-config", path, "--out", tmp_path / "b", *arguments)
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert message in error
    assert error.startswith(f"{path}: ") or "--dim" in message
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_command_line_without_a_config(tmp_path):
    for arguments, message in (
        ((), "export needs one of --dim and --hf-config"),
        (("--dim", 8), "export needs --max-seq-len with --dim"),
        (("--dim", 8, "--max-seq-len", 4, "--layer-type", "a"), "--layer-type is for --hf-config"),
        (("--hf-config", tmp_path / "no.json"), "no.json does not exist"),
    ):
        result = run_cli("--out", tmp_path / "b", *arguments)
        assert result.exit_code == 2
        assert message in json.loads(result.stdout)["error"]
    assert not any(tmp_path.iterdir())


def test_a_layer_of_several(tmp_path):
    path = write_config(tmp_path, SIZES | {"rope_parameters": LAYERS})
    result = run_cli(
        "--hf-config", path, "--layer-type", "full_attention", "--out", tmp_path / "b",
        "--format", "onnx",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    session = rotary_export.load(tmp_path / "b", require_fused=True)
    inputs = make_inputs("linear", BOUNDARY)
    got = session(**{key: value.numpy() for key, value in inputs.items()})["query_out"]
    parameters = dataclasses.replace(read_rope(make_values("linear"))[None], factor=2.0, base=1e4)
    cos, sin = ScaledRotaryEmbedding(parameters)(inputs["position_ids"])
    want = rotate_eagerly(inputs["query"], cos, sin, None, False)
    np.testing.assert_array_equal(got, want.numpy())
