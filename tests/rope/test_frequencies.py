"""The rope types' frequencies and attention factors: to the bit transformers', and in float64."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from helpers.hf_modules import make_config, quiet
from helpers.oracles import assert_same_bits
from helpers.paths import ROOT
from helpers.rope_cases import (
    BUNDLES,
    CASES,
    FORMULAS,
    IN_TRANSFORMERS,
    LENGTH_DEPENDENT,
    RopeCase,
    compute_theta,
    sweep,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rotary_export.errors import RotaryExportError
from rotary_export.rope import read_rope
from rotary_export.rope.axes import IMAGE_LAYOUTS, SECTION_LAYOUTS, assign_axes
from rotary_export.rope.rope_types import ROPE_TYPES, from_dict
from rotary_export.rope.types.axial import Axial
from rotary_export.rope.types.default import Default


def compute_theirs(case, seq_len=None):
    config = make_config(case.config)
    if case.rope_type == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    with quiet():
        return ROPE_INIT_FUNCTIONS[case.rope_type](config, "cpu", seq_len=seq_len)


def test_every_type_is_in_every_table():
    """axial, of images, has tests of its own."""
    language = ROPE_TYPES.keys() - {"axial"}
    assert {case.rope_type for case in CASES} == language
    assert {rope["rope_type"] for rope in BUNDLES.values()} == language
    assert FORMULAS.keys() == language


def test_every_type_is_in_the_page():
    page = (ROOT / "rotary_export" / "rope" / "README.md").read_text(encoding="utf-8")
    for name, rope_type in ROPE_TYPES.items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        for key in rope_type.required_keys:
            assert f"**{key}**" in row
        for alias in rope_type.aliases:
            assert f"`{alias}`" in row


@sweep(IN_TRANSFORMERS)
def test_frequencies_are_those_of_transformers(case):
    parameters = read_rope(case.config)[None]
    want, attention = compute_theirs(case)
    assert_same_bits(parameters.compute_inv_freq(), want, case.name)
    assert parameters.compute_attention_factor() == attention
    assert parameters.rotary_dim == 2 * len(want)


@sweep(LENGTH_DEPENDENT)
@pytest.mark.parametrize("seq_len", [1, 1023, 1024, 1025, 2047, 2048, 2049, 3000, 8192, 100000])
def test_frequencies_of_a_length_are_those_of_transformers(case, seq_len):
    parameters = read_rope(case.config)[None]
    want, _ = compute_theirs(case, seq_len)
    assert_same_bits(parameters.compute_inv_freq(seq_len), want, "an int")
    length = torch.tensor(seq_len)
    if case.rope_type == "dynamic" and seq_len > parameters.max_position_embeddings:
        want, _ = compute_theirs(case, length)  # as its forward calls it
    assert_same_bits(parameters.compute_inv_freq(length), want, "a tensor")


@sweep()
def test_frequencies_are_right_in_float64(case):
    p = read_rope(case.config)[None]
    edge = p.length_boundary or 1
    for length in (1, edge, edge + 1, 3 * edge):
        got = p.compute_inv_freq(length).numpy()
        np.testing.assert_allclose(got, compute_theta(p, length), rtol=3e-6, err_msg=str(length))


@sweep()
def test_a_manifest_contains_what_the_type_needs(case):
    p = read_rope(case.config)[None]
    values = json.loads(json.dumps(p.to_dict()))
    assert from_dict(values) == p
    assert values["rope_type"] == case.rope_type
    with pytest.raises(TypeError, match="unexpected keyword argument 'more'"):
        from_dict(values | {"more": 1})
    with pytest.raises(TypeError, match=r"rope_type must be one of .* got 'ntk'"):
        from_dict(values | {"rope_type": "ntk"})


def test_dynamic_grows_with_the_length_as_in_the_paper():
    case = RopeCase("dynamic", {"rope_type": "dynamic", "factor": 2.0})
    parameters = read_rope(case.config)[None]
    at = {n: float(parameters.compute_inv_freq(n)[1]) for n in (100, 2048, 2049, 3000, 4096)}
    want = {100: 0.749894, 2048: 0.749894, 2049: 0.749871, 3000: 0.734160, 4096: 0.723784}
    assert at == pytest.approx(want, abs=1e-6)


def test_deepseek_mscale():
    """Tables times m(mscale) / m(mscale_all_dim), softmax times m(mscale_all_dim) squared."""
    rope = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
    case = RopeCase("deepseek", rope | {"mscale": 0.707, "mscale_all_dim": 1.0})
    parameters = read_rope(case.config)[None]
    m = 0.1 * math.log(40) + 1
    assert parameters.attention_factor == pytest.approx((0.0707 * math.log(40) + 1) / m)
    assert parameters.softmax_factor == pytest.approx(m * m)
    plain = RopeCase("yarn", rope)
    assert read_rope(plain.config)[None].softmax_factor == 1.0
    assert read_rope(plain.config)[None].attention_factor == pytest.approx(m)


def test_deepseek_softmax_factor_is_that_of_its_attention():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.9,
        "mscale_all_dim": 0.8,
    }
    config = make_config({"model_type": "deepseek_v3", "rope_parameters": rope})
    attention = DeepseekV3Attention(config, 0)
    plain = config.qk_head_dim**-0.5
    assert attention.scaling == pytest.approx(plain * read_rope(config)[None].softmax_factor)


def test_hunyuan_alpha_is_a_fixed_base():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}
    config = {"model_type": "hunyuan_v1_dense", "head_dim": 128, "rope_parameters": rope}
    parameters = read_rope({"max_position_embeddings": 64, "num_attention_heads": 4, **config})[
        None
    ]
    assert parameters.length_boundary is None
    i = np.arange(0, 128, 2) / 128
    want = (10000.0 * 1000.0 ** (128 / 126)) ** -i
    np.testing.assert_allclose(parameters.compute_inv_freq().numpy(), want, rtol=2e-6)


def test_phimoe_has_two_attention_factors():
    case = next(case for case in CASES if case.name == "longrope")
    rope = case.rope | {"short_mscale": 1.1, "long_mscale": 1.3}
    parameters = read_rope(RopeCase("phimoe", rope).config)[None]
    assert parameters.compute_attention_factor() == 1.1
    assert parameters.compute_attention_factor(1024) == 1.1
    assert parameters.compute_attention_factor(1025) == 1.3
    assert float(parameters.compute_attention_factor(torch.tensor(1024))) == pytest.approx(1.1)
    assert float(parameters.compute_attention_factor(torch.tensor(1025))) == pytest.approx(1.3)


def test_axial_shares_its_frequencies():
    sizes = {"head_dim": 80, "dim": 40, "max_position_embeddings": 0}
    parameters = Axial(base=10000.0, **sizes, axis_layout="rows-first")
    inv_freq = parameters.compute_inv_freq()
    want = 1.0 / 10000.0 ** (torch.arange(0, 40, 2).float() / 40)
    assert_same_bits(inv_freq, torch.cat((want, want)))
    assert parameters.find_axes() == (0,) * 20 + (1,) * 20
    assert parameters.rotary_dim == 80


def test_axes_of_each_column():
    assert assign_axes("", (), 6) == ()
    assert assign_axes("chunked", (2, 3, 1), 6) == (0, 0, 1, 1, 1, 2)
    assert assign_axes("interleaved", (2, 2, 2), 6) == (0, 1, 2, 0, 1, 2)
    assert assign_axes("interleaved", (4, 1, 1), 6) == (0, 1, 2, 0, 0, 0)
    assert assign_axes("pairs-first", (2, 2, 2), 6) == (1, 2, 1, 2, 0, 0)
    assert assign_axes("rows-first", (), 6) == (0, 0, 0, 1, 1, 1)
    assert assign_axes("even-odd", (), 6) == (0, 0, 0, 1, 1, 1)
    assert assign_axes("columns-first", (), 6) == (1, 1, 1, 0, 0, 0)
    assert assign_axes("alternating", (), 6) == (1, 0, 1, 0, 1, 0)
    assert assign_axes("three-axes", (), 6) == (0, 0, 1, 1, 2, 2)
    for layout, section, message in (
        ("chunked", (2, 3, 2), "mrope_section must sum to rotary_dim / 2 = 6, got [2, 3, 2]"),
        ("chunked", (3, 3), "mrope_section must have 3 sections, got [3, 3]"),
        ("x", (), f"axis_layout must be one of {', '.join((*SECTION_LAYOUTS, *IMAGE_LAYOUTS))}, g"),
    ):
        with pytest.raises(RotaryExportError, match=re.escape(message)):
            assign_axes(layout, section, 6)


def test_parameters_are_frozen():
    parameters = Default(base=10000.0, head_dim=64, dim=64, max_position_embeddings=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        parameters.base = 1.0
