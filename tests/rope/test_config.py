"""Reading configs: old and new style, dicts, objects and files, every kind of bad input."""

from __future__ import annotations

import copy
import json

import pytest
from helpers.hf_modules import make_config
from helpers.rope_cases import CASES, SOME, RopeCase, sweep

from rotary_export.rope import read_rope
from rotary_export.rope.config import read_attention

LLAMA = RopeCase("llama", {"rope_type": "default"}).config
LONGROPE = next(case for case in CASES if case.name == "longrope")


def without(values, *names):
    return {k: v for k, v in values.items() if k not in names}


class Attributes:
    """An object that is only read through its attributes."""

    def __init__(self, values):
        self.__dict__.update(values)


@sweep(SOME)
def test_every_source_reads_the_same(case, tmp_path):
    want = read_rope(case.config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(case.config))
    config = make_config(case.config)
    sources = (str(path), path, tmp_path, Attributes(case.config), config, config.to_dict())
    for source in (*sources, {"model_type": "vlm", "text_config": case.config}):
        assert read_rope(source) == want


@sweep(SOME)
def test_old_style_reads_the_same(case):
    """`rope_scaling` with `type`, `rope_theta` beside it."""
    rope = dict(case.rope)
    rope["type"] = rope.pop("rope_type")
    outside = {"rope_theta": rope.pop("rope_theta", 10000.0)}
    if "partial_rotary_factor" in rope:
        outside["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    old = without(case.config, "rope_parameters") | {"rope_scaling": rope} | outside
    assert read_rope(old) == read_rope(case.config)


def test_reading_changes_nothing():
    for case in CASES:
        config = case.config
        before = copy.deepcopy(config)
        read_rope(config)
        assert config == before


def test_a_config_may_leave_out_the_base_of_a_known_family():
    config = without(LLAMA, "rope_parameters")
    assert read_rope(config)[None].base == 10000.0
    assert read_rope(config | {"rope_theta": 5e5})[None].base == 5e5
    assert read_rope(config | {"model_type": "mixtral"})[None].base == 1e6


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_phi3_calls_longrope_by_old_names(name):
    config = LONGROPE.config
    rope = without(config["rope_parameters"], "rope_type") | {"type": name}
    old = config | {"model_type": "phi3", "rope_parameters": rope}
    assert read_rope(old) == read_rope(config)


def test_phi3_keeps_the_original_length_outside():
    """It stands before the one inside, as in transformers."""
    config = LONGROPE.config | {"original_max_position_embeddings": 512}
    assert read_rope(config)[None].length_boundary == 512


def test_layers_have_their_own_ropes():
    config = LLAMA | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "nope_attention": None,
        }
    }
    ropes = read_rope(config)
    assert list(ropes) == ["full_attention", "sliding_attention", "nope_attention"]
    assert (ropes["full_attention"].rope_type, ropes["full_attention"].factor) == ("linear", 8.0)
    assert ropes["sliding_attention"].base == 1e4
    assert ropes["nope_attention"] is None


def test_yarn_truncate_is_read_where_it_stands():
    """transformers 5.23 reads it from the top level alone, where a layer's own is not."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    layers = {"full_attention": rope | {"truncate": False}, "sliding_attention": rope}
    ropes = read_rope(LLAMA | {"rope_parameters": layers})
    assert [p.truncate for p in ropes.values()] == [False, True]


def test_old_gemma3_has_two_bases():
    old = without(LLAMA, "rope_parameters") | {"model_type": "gemma3_text"}
    ropes = read_rope(old | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    full, sliding = ropes["full_attention"], ropes["sliding_attention"]
    assert (full.rope_type, full.base, full.factor) == ("linear", 1e6, 8.0)
    assert (sliding.rope_type, sliding.base) == ("default", 1e4)
    ropes = read_rope(old | {"rope_theta": 5e5, "rope_local_base_freq": 2e4})
    assert [p.base for p in ropes.values()] == [5e5, 2e4]


def test_old_deepseek_v4_has_two_ropes():
    """Flat yarn of the layers that compress; the rotary share from its number of channels."""
    yarn = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
    old = {"head_dim": 512, "qk_rope_head_dim": 64, "compress_rope_theta": 1.6e5}
    flat = without(LLAMA, "rope_parameters") | {"model_type": "deepseek_v4"} | old
    ropes = read_rope(flat | {"rope_theta": 1e4, "rope_scaling": yarn})
    main, compress = ropes["main"], ropes["compress"]
    assert (main.rope_type, main.base, main.rotary_dim) == ("default", 1e4, 64)
    assert (compress.rope_type, compress.base, compress.rotary_dim) == ("yarn", 1.6e5, 64)
    assert compress.attention_factor == 1.0
    theirs = read_rope(make_config(flat | {"rope_theta": 1e4, "rope_scaling": yarn}))
    assert {k: vars(p) for k, p in theirs.items()} == {k: vars(p) for k, p in ropes.items()}


def test_sizes_of_one_type_of_layer():
    """Gemma 4: heads of 512 channels in some layers."""
    config = LLAMA | {
        "model_type": "gemma4_text",
        "global_head_dim": 128,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
            "sliding_attention": {"rope_type": "default"},
        },
    }
    ropes = read_rope(config)
    assert [p.head_dim for p in ropes.values()] == [128, 64]
    assert (ropes["full_attention"].rotated_pairs, ropes["full_attention"].rotary_dim) == (16, 128)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 5e4}, (16, 5e4)),
        ({"model_type": "gptj", "rotary_dim": 32}, (32, 1e4)),
        ({"model_type": "phi", "rope_theta": 1e4}, (32, 1e4)),
        ({"model_type": "x", "rope_theta": 1e4, "partial_rotary_factor": 0.75}, (48, 1e4)),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_partial_under_every_name(config, want):
    sizes = {"hidden_size": 256, "num_attention_heads": 4}
    parameters = read_rope(sizes | config)[None]
    assert (parameters.rotary_dim, parameters.base) == want


def test_attention_of_a_config():
    parameters, found = read_attention(LLAMA)
    assert parameters == read_rope(LLAMA)[None]
    assert found == {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "interleaved": False}
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "rope_theta": 1e4}
    assert read_attention(sizes | {"model_type": "cohere"})[1]["interleaved"] is True
    assert read_attention(sizes | {"model_type": "mine"})[1]["interleaved"] is None
    latent = sizes | {"model_type": "deepseek_v3", "qk_rope_head_dim": 32}
    assert read_attention(latent)[1] | {"interleaved": 0} == {
        "num_heads": 4, "num_kv_heads": 1, "head_dim": 32, "interleaved": 0,
    }  # fmt: skip


def test_heads_of_falcon():
    sizes = {"model_type": "falcon", "hidden_size": 256, "num_attention_heads": 4}
    for more, kv_heads in (
        ({"multi_query": True}, 1),
        ({"multi_query": False}, 4),
        ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2}, 2),
    ):
        assert read_attention(sizes | more)[1]["num_kv_heads"] == kv_heads
