"""The rope types' frequencies and attention factors, equal to transformers' to the bit."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers.hf_modules import make_config, quiet
from helpers.oracles import assert_same_bits
from helpers.rope_cases import CASES, MOVING, RopeCase, sweep
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rotary_export.errors import RotaryExportError
from rotary_export.rope import (
    RopeParameters,
    compute_attention_factor,
    compute_inv_freq,
    read_rope,
)
from rotary_export.rope.frequencies import find_axes


def compute_theirs(case, seq_len=None):
    config = make_config(case.config)
    if case.rope_type == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    with quiet():
        return ROPE_INIT_FUNCTIONS[case.rope_type](config, "cpu", seq_len=seq_len)


@sweep()
def test_frequencies_are_those_of_transformers(case):
    parameters = read_rope(case.config)[None]
    want, attention = compute_theirs(case)
    assert_same_bits(compute_inv_freq(parameters), want, case.name)
    assert compute_attention_factor(parameters) == attention
    assert parameters.rotary_dim == 2 * len(want)


@sweep(MOVING)
@pytest.mark.parametrize("seq_len", [1, 1023, 1024, 1025, 2047, 2048, 2049, 3000, 8192, 100000])
def test_frequencies_of_a_length_are_those_of_transformers(case, seq_len):
    parameters = read_rope(case.config)[None]
    want, _ = compute_theirs(case, seq_len)
    assert_same_bits(compute_inv_freq(parameters, seq_len), want, "an int")
    length = torch.tensor(seq_len)
    if case.rope_type == "dynamic" and seq_len > parameters.max_position_embeddings:
        want, _ = compute_theirs(case, length)  # as its forward calls it
    assert_same_bits(compute_inv_freq(parameters, length), want, "a tensor")


@sweep()
def test_frequencies_are_right_in_float64(case):
    """The formulas once more, in numpy, sharing no code."""
    p = read_rope(case.config)[None]
    i = np.arange(0, p.dim, 2, dtype=np.float64) / p.dim
    theta = p.base**-i
    if p.rope_type == "linear":
        theta /= p.factor
    elif p.rope_type == "yarn":
        turns = p.original_max_position_embeddings * p.base**-i / (2 * np.pi)
        theta = blend_yarn(p, theta, turns)
    elif p.rope_type == "longrope":
        theta /= np.array(p.short_factor)
    elif p.rope_type == "llama3":
        turns = p.original_max_position_embeddings * theta / (2 * np.pi)
        keep = (turns - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor)
        theta *= np.clip(keep, 0, 1) + (1 - np.clip(keep, 0, 1)) / p.factor
    elif p.rope_type == "proportional":
        theta[p.rotated_pairs :] = 0
        theta /= p.factor
    np.testing.assert_allclose(compute_inv_freq(p).numpy(), theta, rtol=3e-6)


def blend_yarn(p: RopeParameters, theta: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Divide the pairs that turn less than beta_slow times, keep those over beta_fast."""
    pair = np.arange(len(theta))
    # The pair at which a number of turns is reached, by inverting `turns`.
    low, high = (
        np.interp(-np.log(beta), -np.log(turns), pair, left=-np.inf, right=np.inf)
        for beta in (p.beta_fast, p.beta_slow)
    )
    slope = math.log(turns[0] / turns[1])
    low, high = (
        math.log(turns[0] / beta) / slope if np.isinf(at) else at
        for at, beta in ((low, p.beta_fast), (high, p.beta_slow))
    )
    if p.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, p.dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((pair - low) / (high - low), 0, 1)
    return theta * ((1 - ramp) + ramp / p.factor)


def test_dynamic_grows_with_the_length_as_the_paper_says():
    case = RopeCase("dynamic", {"rope_type": "dynamic", "factor": 2.0})
    parameters = read_rope(case.config)[None]
    at = {n: float(compute_inv_freq(parameters, n)[1]) for n in (100, 2048, 2049, 3000, 4096)}
    want = {100: 0.749894, 2048: 0.749894, 2049: 0.749871, 3000: 0.734160, 4096: 0.723784}
    assert at == pytest.approx(want, abs=1e-6)


def test_deepseek_mscale():
    """The tables take m(mscale) / m(mscale_all_dim), the softmax m(mscale_all_dim) squared."""
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
    assert parameters.switch_length is None
    i = np.arange(0, 128, 2) / 128
    want = (10000.0 * 1000.0 ** (128 / 126)) ** -i
    np.testing.assert_allclose(compute_inv_freq(parameters).numpy(), want, rtol=2e-6)


def test_phimoe_has_two_attention_factors():
    case = next(case for case in CASES if case.name == "longrope")
    rope = case.rope | {"short_mscale": 1.1, "long_mscale": 1.3}
    parameters = read_rope(RopeCase("phimoe", rope).config)[None]
    assert compute_attention_factor(parameters) == 1.1
    assert compute_attention_factor(parameters, 1024) == 1.1
    assert compute_attention_factor(parameters, 1025) == 1.3
    assert float(compute_attention_factor(parameters, torch.tensor(1024))) == pytest.approx(1.1)
    assert float(compute_attention_factor(parameters, torch.tensor(1025))) == pytest.approx(1.3)


def test_axial_shares_its_frequencies():
    parameters = RopeParameters("axial", 10000.0, 80, 40, 0)
    inv_freq = compute_inv_freq(parameters)
    want = 1.0 / 10000.0 ** (torch.arange(0, 40, 2).float() / 40)
    assert_same_bits(inv_freq, torch.cat((want, want)))
    assert find_axes(parameters) == (0,) * 20 + (1,) * 20
    assert parameters.rotary_dim == 80


def test_mrope_axes():
    def find(layout, section):
        p = RopeParameters("default", 1e4, 12, 12, 0, mrope_section=section, mrope_layout=layout)
        return find_axes(p)

    assert find("chunked", (2, 3, 1)) == (0, 0, 1, 1, 1, 2)
    assert find("interleaved", (2, 2, 2)) == (0, 1, 2, 0, 1, 2)
    assert find("interleaved", (4, 1, 1)) == (0, 1, 2, 0, 0, 0)
    assert find("pairs-first", (2, 2, 2)) == (1, 2, 1, 2, 0, 0)
    with pytest.raises(RotaryExportError, match="must sum to rotary_dim / 2 = 6, got"):
        find("chunked", (2, 3, 2))
    with pytest.raises(RotaryExportError, match="must have 3 sections"):
        find("chunked", (3, 3))


def test_parameters_are_frozen():
    parameters = RopeParameters("default", 10000.0, 64, 64, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        parameters.base = 1.0
