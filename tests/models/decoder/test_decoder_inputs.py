"""Example inputs of a decoder: made, completed by a cache, or refused."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from helpers.tiny_models import make_cache, make_config, make_model
from torch import nn

from rotary_export.errors import RotaryExportError
from rotary_export.models.arguments import read_arguments
from rotary_export.models.decoder.inputs import prepare_inputs
from rotary_export.models.decoder.options import DecoderOptions

STEP = ["input_ids", "attention_mask", "position_ids"]
IDS = {"input_ids": torch.ones(2, 3, dtype=torch.int64)}


@functools.cache
def make_small(family="llama"):
    return make_model(family, num_hidden_layers=1)


class RenamedLlama(transformers.LlamaForCausalLM):
    """As transformers names the argument from 5.24 on."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **rest):
        return super().forward(input_ids, attention_mask, position_ids, cache, **rest)


def prepare(inputs=None, model=None, **options):
    return prepare_inputs(
        make_small() if model is None else model, inputs, DecoderOptions(**options)
    )


def list_names(inputs):
    return [*read_arguments(inputs)[1]]


PAST = ["past_key_values.0.key", "past_key_values.0.value"]


@pytest.mark.parametrize(
    ("inputs", "options", "names"),
    [
        (None, {}, STEP + PAST),
        (None, {"cache": "none"}, STEP),
        (IDS, {}, ["input_ids"]),
        (IDS, {"cache": "full"}, STEP + PAST),
        (IDS | {"use_cache": True}, {}, STEP + PAST),
        (IDS | {"past_key_values": None}, {}, ["input_ids"]),
        (IDS | {"past_key_values": None}, {"cache": "full"}, STEP + PAST),
    ],
)
def test_which_inputs_have_a_cache(inputs, options, names):
    assert list_names(prepare(inputs, **options)) == names


def test_an_encoder_has_no_cache():
    assert list_names(prepare(model=make_small("modernbert"))) == STEP


PAIR = (torch.ones(2, 2, 5, 16), torch.ones(2, 2, 5, 16))


@pytest.mark.parametrize("given", ["past_key_values", "cache"])
@pytest.mark.parametrize(
    "made", [tuple, lambda pairs: make_cache(pairs[0])], ids=["pairs", "cache"]
)
@pytest.mark.parametrize("argument", ["past_key_values", "cache"])
def test_a_cache_is_found_by_either_name(given, made, argument):
    model = make_small()
    if argument == "cache":
        model = RenamedLlama(make_config("llama", num_hidden_layers=1))
    inputs = prepare({**IDS, given: made([PAIR])}, model)
    assert argument in inputs
    assert list_names(inputs) == ["input_ids", *PAST]


def test_logits_of_the_last_position():
    assert prepare(IDS, last_logits=True)["logits_to_keep"] == 1


def make_hybrid():
    config = transformers.Qwen3NextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size=32, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=8, shared_expert_intermediate_size=8, linear_num_value_heads=2,
        linear_num_key_heads=1, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


REFUSED = {
    "unknown": ({}, None, {"cache": "large"}, "one of full, window, static, none, got 'large'"),
    "not a string": ({}, None, {"cache": ["full"]}, "cache must be one of"),
    "cache and none": (
        IDS | {"past_key_values": make_cache([])},
        None,
        {"cache": "none"},
        "cache 'none' must go with no cache, example_inputs has past_key_values",
    ),
    "use_cache and none": (
        IDS | {"use_cache": True}, None, {"cache": "none"}, "example_inputs has use_cache=True"
    ),
    "no use_cache and full": (
        IDS | {"use_cache": False}, None, {"cache": "full"}, "must go with use_cache=True"
    ),
    "encoder": (
        None, lambda: make_small("modernbert"), {"cache": "full"},
        "ModernBertForMaskedLM does not: pass cache='none' \\(--cache none\\)",
    ),
    "not of transformers": (
        {"input": torch.ones(1, 2)}, lambda: nn.Linear(2, 2), {"cache": "full"}, "Linear does not"
    ),
    "recurrent state": (None, make_hybrid, {}, "Qwen3NextFor.*LinearAttentionLayer.*--cache none"),
    "last logits": (
        {"input": torch.ones(1, 2)}, lambda: nn.Linear(2, 2), {"last_logits": True},
        "last_logits is for a model whose forward accepts logits_to_keep; that of Linear does not",
    ),
    "last logits of a number": (IDS, None, {"last_logits": 1}, "last_logits must be a bool, got 1"),
    "not a model": (None, lambda: 3, {}, "model must be a torch.nn.Module, got int"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    inputs, make, options, message = REFUSED[case]
    with pytest.raises(RotaryExportError, match=message):
        prepare(inputs, None if make is None else make(), **options)


def test_a_config_that_does_not_describe_its_layers():
    model = make_model("llama", num_hidden_layers=1)
    model.config = transformers.BltConfig()  # of three models
    with pytest.raises(RotaryExportError, match=r"no cache for LlamaForCausalLM: .*cache='none'"):
        prepare_inputs(model, None, DecoderOptions("full"))
