"""Masks of padded batches in whole models, in the forms that models make of them."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_modules import rope_of
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rotary_export import export_model, load


class Encoder(nn.Module):
    """Two heads of attention; `make_mask` turns (B, S) into what attention is given."""

    def __init__(self, make_mask):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 32)
        self.make_mask = make_mask

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        heads = torch.stack([rope_of(part) for part in x.split(16, -1)], 1)
        mask = self.make_mask(attention_mask)
        return (
            scaled_dot_product_attention(
                heads, heads, x[:, None].unflatten(-1, (2, 16)).sum(1).transpose(1, 2), mask
            )
            .transpose(1, 2)
            .flatten(2)
        )


def make_inputs(batch, length):
    mask = torch.arange(length) < length - torch.arange(batch)[:, None] % 3
    return {"input_ids": torch.randint(0, 32, (batch, length)), "attention_mask": mask.long()}


def add_causal(mask):
    length = mask.shape[1]
    causal = torch.full((length, length), float("-inf")).triu(1)
    return causal + (1.0 - mask[:, None, None]) * -1e4


MASKS = {
    "bool": lambda mask: mask.bool()[:, None, None],
    "float": lambda mask: (1.0 - mask[:, None, None]) * torch.finfo(torch.float32).min,
    "heads": lambda mask: mask.bool()[:, None, None].expand(-1, 2, -1, -1),
    "causal": add_causal,
}


def check(bundle, model, inputs):
    with torch.no_grad():
        want = model(**inputs)
    for options in ({}, {"use_op_library": False}):
        got = torch.as_tensor(load(bundle, "model", **options)(**inputs)["output"])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("opset", [22, 23])
@pytest.mark.parametrize("make_mask", MASKS.values(), ids=MASKS)
def test_a_padded_batch(tmp_path, make_mask, opset):
    model = Encoder(make_mask).eval()
    bundle = export_model(model, make_inputs(2, 6), tmp_path / "b", formats=["onnx"], opset=opset)
    check(bundle, model, make_inputs(4, 9))


@pytest.mark.parametrize("name", ["bool", "float"])
def test_a_mask_of_one_row_as_an_input(tmp_path, name):
    def make(batch, length):
        inputs = make_inputs(batch, length)
        return inputs | {"attention_mask": MASKS[name](inputs["attention_mask"])}

    model = Encoder(lambda mask: mask).eval()
    bundle = export_model(model, make(2, 6), tmp_path / "b", formats=["onnx"])
    shapes = [info.shape for info in bundle.manifest.graphs["model"].inputs]
    assert shapes[1] == ("batch_size", 1, 1, "seq_len")
    check(bundle, model, make(4, 9))
