"""What is computed from positions is float32, and rounded once where it meets an activation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rotary_export.models.trace.float32_tables import Float32Tables

INV_FREQ = (10000.0 ** -(torch.arange(0, 8, 2) / 8)).half()


def turn(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def by_einsum(x, inv_freq):
    angles = torch.einsum("i,j->ij", torch.arange(x.shape[1]).type_as(inv_freq), inv_freq)
    angles = torch.cat((angles, angles), -1)
    return turn(x, angles.cos(), angles.sin())


def by_product(x, inv_freq):
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * inv_freq
    emb = torch.cat((angles, angles), -1).to(x.dtype)
    return turn(x, emb.cos().to(x), emb.sin().half())


def by_ids(x, inv_freq):
    ids = torch.ones(1, x.shape[1], dtype=torch.int64).cumsum(-1) - 1
    angles = (inv_freq[:, None] @ ids[:, None].to(inv_freq.dtype)).transpose(1, 2)
    tables = [f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin)]
    assert {table.dtype for table in tables} == {torch.float16}  # as the model believes
    return turn(x, *tables)


def written(x, inv_freq):
    tables = torch.empty(2, x.shape[1], 8, dtype=x.dtype)
    angles = torch.arange(x.shape[1])[:, None].half() * inv_freq
    angles = torch.cat((angles, angles), -1)
    tables[0], tables[1] = angles.cos(), angles.sin()
    return turn(x, *tables)


@pytest.mark.parametrize("model", [by_einsum, by_product, by_ids, written])
def test_tables_are_rounded_once(model):
    x = torch.randn(1, 3000, 8).half()
    angles = torch.arange(3000)[:, None] * INV_FREQ.float()
    angles = torch.cat((angles, angles), -1)
    want = turn(x, angles.cos().half(), angles.sin().half())
    with Float32Tables([x]):
        got = model(x, INV_FREQ)
    assert got.dtype == torch.float16
    assert torch.equal(got, want)
    assert not torch.allclose(model(x, INV_FREQ).float(), want.float(), atol=0.1)


def test_layers_and_masks_keep_their_type():
    embed, linear = nn.Embedding(9, 8).half(), nn.Linear(8, 8).half()
    ids = torch.tensor([[1, 2, 0]])
    with Float32Tables([ids]):
        mask = (ids != 0).half()[..., None]
        hidden = embed(ids)
        output = linear(hidden * mask) + mask
    assert output.dtype == torch.float16
    mask = (ids != 0).half()[..., None]
    assert torch.equal(output, linear(embed(ids) * mask) + mask)


def test_float32_is_left_as_it_is():
    x = torch.randn(1, 9, 8)
    with Float32Tables([x]):
        got = by_einsum(x, INV_FREQ.float())
    assert torch.equal(got, by_einsum(x, INV_FREQ.float()))


def test_the_inputs_are_unmarked_afterwards():
    x = torch.randn(1, 3, 8).half()
    with Float32Tables([x]):
        by_product(x, INV_FREQ)
    assert vars(x) == {}
