"""Configs that can't be read: each is one clear error that names the key and the value."""

from __future__ import annotations

import contextlib
import math
import re

import pytest
import torch
from helpers.rope_cases import CASES, SOME, RopeCase, sweep

from rotary_export.errors import RotaryExportError
from rotary_export.rope import ScaledRotaryEmbedding, read_rope
from rotary_export.rope.config import read_attention

LLAMA = RopeCase("llama", {"rope_type": "default"}).config
LONGROPE = next(case for case in CASES if case.name == "longrope")


def without(values, *names):
    return {k: v for k, v in values.items() if k not in names}


ROPE = LLAMA["rope_parameters"]
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = next(case for case in CASES if case.name == "llama3").config["rope_parameters"]
LONG = LONGROPE.config["rope_parameters"]
LINEAR = ROPE | {"rope_type": "linear", "factor": 2.0}
QWEN = {"model_type": "qwen2_vl_text"}
# What is changed of LLAMA, or of its rope parameters, and the message.
BAD = {
    "unknown type": (ROPE | {"rope_type": "ntk"}, "rope_type must be one of axial, default"),
    "type is not text": (ROPE | {"rope_type": 3}, "rope_type must be one of axial"),
    "linear, no factor": (without(LINEAR, "factor"), "rope type 'linear' needs factor"),
    "linear, text": (LINEAR | {"factor": "2"}, "factor must be a number > 0 and < 1e30, got '2'"),
    "linear, 0": (LINEAR | {"factor": 0}, "factor must be a number > 0 and < 1e30, got 0"),
    "linear, nan": (LINEAR | {"factor": float("nan")}, "factor must be a number > 0 and < 1e30"),
    "linear, true": (LINEAR | {"factor": True}, "factor must be a number > 0 and < 1e30, got True"),
    "dynamic, no factor": (ROPE | {"rope_type": "dynamic"}, "factor is missing in the rope"),
    "base": (ROPE | {"rope_theta": -1.0}, "rope_theta must be a number > 0 and < 1e30, got -1.0"),
    "base 1": (ROPE | {"rope_theta": 1.0}, "rope_theta must be > 1, got 1.0"),
    "base is a list": (ROPE | {"rope_theta": [1e4]}, "rope_theta must be a number > 0 and < 1e30"),
    "partial 2": (ROPE | {"partial_rotary_factor": 2.0}, "partial_rotary_factor must fit head_dim"),
    "partial 0": (ROPE | {"partial_rotary_factor": 0.01}, "partial_rotary_factor times head_dim"),
    "yarn, no factor": (
        ROPE | {"rope_type": "yarn"},
        "rope type 'yarn' needs factor or original_max_position_embeddings, the config has neither",
    ),
    "yarn, length": (
        YARN | {"original_max_position_embeddings": 0.5},
        "original_max_position_embeddings must be an int >= 1 and < 2**31, got 0.5",
    ),
    "yarn, truncate": (YARN | {"truncate": "no"}, "truncate must be true or false, got 'no'"),
    "yarn, mscale": (YARN | {"mscale": "1"}, "mscale must be a number > 0 and < 1e30, got '1'"),
    "yarn, attention": (YARN | {"attention_factor": -1}, "attention_factor must be a number"),
    "yarn, betas": (YARN | {"beta_fast": []}, "beta_fast must be a number > 0 and < 1e30"),
    "llama3, no low": (without(LLAMA3, "low_freq_factor"), "'llama3' needs low_freq_factor"),
    "llama3, order": (
        LLAMA3 | {"high_freq_factor": 1.0},
        "high_freq_factor must be > low_freq_factor = 1, got 1.0",
    ),
    "longrope, no long": (without(LONG, "long_factor"), "'longrope' needs long_factor"),
    "longrope, short": (LONG | {"short_factor": [1.0] * 31}, "short_factor must have rotary_dim"),
    "longrope, text": (LONG | {"long_factor": "1"}, "long_factor must be a list of numbers"),
    "longrope, zero": (LONG | {"long_factor": [0.0] * 32}, "long_factor must be a list of numbers"),
    "longrope, one mscale": (LONG | {"long_mscale": 1.1}, "short_mscale is missing in"),
    "axial": (ROPE | {"rope_type": "axial"}, "'axial' of model_type 'llama' is not known"),
    "section": (ROPE | {"mrope_section": [16, 8, 7]}, "mrope_section must sum to"),
    "section text": (ROPE | {"mrope_section": "abc"}, "mrope_section must be a list of ints >= 0"),
    "section, 2": (ROPE | {"mrope_section": [16, 16]}, "mrope_section must have 3 sections"),
    "alpha": (ROPE | {"rope_type": "dynamic", "alpha": -2}, "alpha must be a number > 0 and"),
}  # fmt: skip
BAD_TOP = {
    "no rope": (
        {"model_type": "gpt2", "rope_parameters": None},
        "the config has no rotary embedding: no rope_parameters, rope_scaling or rope_theta, and "
        "model_type 'gpt2' is not known to have one",
    ),
    "rope is a list": ({"rope_parameters": [1]}, "rope_parameters must be a dict, got [1]"),
    "head_dim": ({"head_dim": "64"}, "head_dim must be an int >= 1 and < 2**31, got '64'"),
    "head_dim 0": ({"head_dim": 0}, "head_dim must be an int >= 1 and < 2**31, got 0"),
    "no heads": (
        {"head_dim": None, "num_attention_heads": None},
        "num_attention_heads or n_head or",
    ),
    "no hidden_size": ({"head_dim": None, "hidden_size": None}, "embed_dim or hidden_size or"),
    "bases of layers": (
        {"layer_rope_theta": [10000.0, 0, 5.0]},
        "layer_rope_theta must be 0 or rope_theta = 10000, got [10000.0, 0, 5.0]",
    ),
    "another family": (
        {"model_type": "musicflamingo"},
        "the angles of model_type 'musicflamingo' are not those of its rope parameters",
    ),
    "own rope": (
        {"model_type": "gpt_oss", "rope_parameters": None},
        "rope_parameters is missing in the config, and model_type 'gpt_oss' has its own",
    ),
    "length": ({"max_position_embeddings": -1}, "max_position_embeddings must be an int >= 1"),
    "dynamic, no length": (
        {
            "max_position_embeddings": None,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
        },
        "max_position_embeddings or n_positions or max_seq_len is missing in",
    ),
    "a layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "linear"}}},
        "rope type 'linear' needs factor, which the config for layers 'full_attention' has not",
    ),
}
CHANGES = {
    **{name: ({"rope_parameters": rope}, message) for name, (rope, message) in BAD.items()},
    **BAD_TOP,
}


@pytest.mark.parametrize("name", CHANGES)
def test_bad_configs_are_one_clear_error(name):
    change, message = CHANGES[name]
    with pytest.raises(RotaryExportError, match=re.escape(message)) as raised:
        read_rope(LLAMA | change)
    assert "\n" not in str(raised.value)


STRANGE = (
    None, "x", "1", -1, 0, 1, 3, 2.5, 1e29, 1e300, 10**400, math.nan, math.inf, True, [], {},
    [None], ["a"] * 3, [1e29] * 32, {"a": 1}, {"full_attention": {"head_dim": "x"}},
)  # fmt: skip


@sweep(SOME)
def test_strange_values_are_read_or_refused(case):
    """Every value of every key in turn: frequencies that are numbers, or one clear error."""
    config = case.config | {"text_config": None, "model_type": "deepseek_v3"}
    more = ("partial_rotary_factor", "mrope_section", "type", "alpha", "mscale", "truncate")
    top = (
        "layer_rope_theta",
        "layer_types",
        "per_layer_config",
        "qk_rope_head_dim",
        "rope_scaling",
    )
    rope = config["rope_parameters"]
    for value in STRANGE:
        changes = [{key: value} for key in (*config, *top)]
        changes += [{"rope_parameters": rope | {key: value}} for key in (*rope, *more)]
        for change in changes:
            ropes = {}
            with contextlib.suppress(RotaryExportError):
                ropes = read_rope(config | change)
                read_attention(config | change, next(iter(ropes)))
            for parameters in ropes.values():
                if parameters is not None:
                    assert ScaledRotaryEmbedding(parameters).inv_freq.isfinite().all(), change


@pytest.mark.parametrize("config", [None, 3, [1], True, b"x"])
def test_what_is_no_config(config):
    with pytest.raises(RotaryExportError, match="config must be a dict, a config object or a path"):
        read_rope(config)


def test_bad_files(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(RotaryExportError, match=r"config\.json does not exist"):
        read_rope(tmp_path)
    path.write_text("{")
    with pytest.raises(RotaryExportError, match=r"config\.json is not valid JSON"):
        read_rope(path)
    path.write_text("[1]")
    with pytest.raises(
        RotaryExportError, match=r"config\.json must contain a JSON object, got list"
    ):
        read_rope(path)


def test_bad_layer_types():
    two = {"a": {"rope_type": "default"}, "b": None}
    with pytest.raises(RotaryExportError, match="layer_type must be one of a, b, got None"):
        read_attention(LLAMA | {"rope_parameters": two})
    with pytest.raises(RotaryExportError, match="layer_type must be one of a, b, got 'c'"):
        read_attention(LLAMA | {"rope_parameters": two}, "c")
    with pytest.raises(RotaryExportError, match=r"layers of type 'b' have no rotary .*NoPE"):
        read_attention(LLAMA | {"rope_parameters": two}, "b")
    with pytest.raises(RotaryExportError, match=r"layer_type must be left out, .* got 'a'"):
        read_attention(LLAMA, "a")


def test_bad_module_arguments():
    with pytest.raises(RotaryExportError, match=r"parameters must be RopeParameters, .* got dict"):
        ScaledRotaryEmbedding(read_rope(LLAMA))
    parameters = read_rope(LLAMA)[None]
    with pytest.raises(RotaryExportError, match="max_seq_len must be an int >= 1, got 0"):
        ScaledRotaryEmbedding(parameters, 0)
    with pytest.raises(RotaryExportError, match=r"position_ids must have shape \(B, S\), got"):
        ScaledRotaryEmbedding(parameters)(torch.arange(3))
