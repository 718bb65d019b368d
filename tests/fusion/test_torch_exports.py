"""Files that torch.onnx itself wrote, with dynamic batch and sequence, fused and run elsewhere."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from helpers.fuse_graphs import find_rotary, run
from torch import Tensor, nn

import rotary_export
from rotary_export.compat.onnx_translations import reuse_translations
from rotary_export.compat.quiet import quiet_torch

N, NKV, D = 4, 2, 16


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


class Decoder(nn.Module):
    """Two attention layers in the manner of transformers, with one pair of tables."""

    def __init__(self, interleaved: bool, rotary_dim: int, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.interleaved, self.rotary_dim, self.factor = interleaved, rotary_dim, factor
        self.embed = nn.Embedding(50, N * D)
        heads = (N + 2 * NKV) * D
        self.project = nn.ModuleList(nn.Linear(N * D, heads, bias=False) for _ in range(2))
        steps = torch.arange(0, rotary_dim, 2) / rotary_dim
        self.register_buffer("inv_freq", 10000.0**-steps)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        head, tail = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        rotated = rotate_pairs(head) if self.interleaved else rotate_half(head)
        return torch.cat((head * cos + rotated * sin, tail), -1)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        position_ids = torch.arange(input_ids.shape[1])[None]
        inv_freq = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
        angles = (inv_freq @ position_ids[:, None, :].float()).transpose(1, 2)
        if self.interleaved:
            angles = angles.repeat_interleave(2, -1)
        else:
            angles = torch.cat((angles, angles), -1)
        cos, sin = (f(angles).mul(self.factor)[:, None] for f in (torch.cos, torch.sin))
        for layer in self.project:
            heads = layer(x).unflatten(-1, (-1, D)).transpose(1, 2)
            query, key, value = heads.split((N, NKV, NKV), 1)
            query, key = self.turn(query, cos, sin), self.turn(key, cos, sin)
            attended = nn.functional.scaled_dot_product_attention(
                query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), is_causal=True
            )
            x = x + attended.transpose(1, 2).flatten(2)
        return x


CASES = {
    "torch-s-node": (23, False, D, 1.0),
    "half": (18, False, D, 1.0),
    "half-partial-factor": (23, False, 8, 1.25),
    "interleaved": (23, True, D, 1.0),
}


@pytest.mark.parametrize(
    ("opset", "interleaved", "rotary_dim", "factor"), CASES.values(), ids=CASES
)
def test_torch_s_export_is_fused_and_runs_at_any_shape(
    tmp_path, opset, interleaved, rotary_dim, factor
):
    model = Decoder(interleaved, rotary_dim, factor).eval()
    file = tmp_path / "in.onnx"
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    with quiet_torch(), reuse_translations():
        program = torch.onnx.export(
            model, (torch.ones(2, 5, dtype=torch.int64),), dynamo=True, opset_version=opset,
            dynamic_shapes=(dims,), verbose=False,
        )  # fmt: skip
        program.save(file)
    result = rotary_export.fuse(file)
    assert (len(result.fused), result.nodes, result.why) == (4, 2, ())
    assert len(find_rotary(result.model)) == 2
    onnx.checker.check_model(result.model, full_check=True)
    for batch, length in ((3, 11), (1, 1), (2, 40)):
        ids = torch.randint(0, 50, (batch, length))
        (got,) = run(result.model, {"input_ids": ids.numpy()})
        with torch.no_grad():
            want = model(ids).numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


class Heads(nn.Module):
    """Rotated query and key, written such that torch's old exporter accepts it, too."""

    def __init__(self, interleaved: bool, rotary_dim: int, gathered: bool) -> None:
        super().__init__()
        self.interleaved, self.rotary_dim, self.gathered = interleaved, rotary_dim, gathered
        self.embed, self.key = nn.Embedding(50, N * D), nn.Linear(N * D, NKV * D)
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim))
        angles = self.tile(torch.arange(64)[:, None] * self.inv_freq)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def tile(self, angles: Tensor) -> Tensor:
        if self.interleaved:
            return torch.stack((angles, angles), dim=-1).flatten(-2)
        return torch.cat((angles, angles), dim=-1)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        head = x[..., : self.rotary_dim]
        rotated = rotate_half(head)
        if self.interleaved:
            rotated = torch.stack((-head[..., 1::2], head[..., ::2]), dim=-1).reshape(head.shape)
        turned = head * cos + rotated * sin
        if self.rotary_dim == D:
            return turned
        return torch.cat((turned, x[..., self.rotary_dim :]), dim=-1)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        batch, length = input_ids.shape
        x = self.embed(input_ids)
        if self.gathered:
            cos, sin = self.cos[position_ids].unsqueeze(1), self.sin[position_ids].unsqueeze(1)
        else:
            inv_freq = self.inv_freq[None, :, None].expand(position_ids.shape[0], -1, 1)
            angles = (inv_freq @ position_ids[:, None, :].float()).transpose(1, 2)
            angles = self.tile(angles)
            cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        query = x.view(batch, length, N, D).transpose(1, 2)
        key = self.key(x).view(batch, length, NKV, D).transpose(1, 2)
        return self.turn(query, cos, sin), self.turn(key, cos, sin)


@pytest.mark.parametrize("gathered", [False, True], ids=["computed", "gathered"])
@pytest.mark.parametrize("rotary_dim", [D, 8], ids=["full", "partial"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_the_old_exporter_s_file_without_shapes_is_fused(
    tmp_path, interleaved, rotary_dim, gathered
):
    model, file = Heads(interleaved, rotary_dim, gathered).eval(), tmp_path / "in.onnx"
    names = ["input_ids", "position_ids"]
    ids, positions = torch.ones(2, 5, dtype=torch.int64), torch.arange(10).view(2, 5)
    with quiet_torch(), reuse_translations():
        torch.onnx.export(
            model, (ids, positions), file, dynamo=False, opset_version=18, input_names=names,
            dynamic_axes={name: {0: "batch", 1: "seq"} for name in names},
        )  # fmt: skip
    assert not any(v.type.tensor_type.HasField("shape") for v in onnx.load(file).graph.value_info)
    result = rotary_export.fuse(file)
    assert (len(result.fused), result.nodes, result.why) == (2, 1, ())
    feeds = {"input_ids": torch.randint(0, 50, (3, 11)), "position_ids": torch.randint(64, (3, 11))}
    got = run(result.model, {name: value.numpy() for name, value in feeds.items()})
    with torch.no_grad():
        want = model(*feeds.values())
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2e-6)
