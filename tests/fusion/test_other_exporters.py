"""Files as optimum and onnxruntime-genai write them, and decoders with a key/value cache.

`tools/coverage/other_exporters.py` makes the real files and fuses them; here is what is particular
to them. optimum runs torch's old exporter, on transformers' modules; these are cut out of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.fuse_graphs import find_rotary, run, write_genai
from helpers.tiny_models import make_cache, make_model
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor, nn

import rotary_export
from rotary_export.compat.onnx_translations import reuse_translations
from rotary_export.compat.quiet import quiet_torch
from rotary_export.errors import CheckFailedError, RotaryExportError

N, NKV, D, R = 4, 2, 16, 8


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def repeat_channels(x: Tensor) -> Tensor:
    """What optimum puts in the place of `repeat_interleave(2, dim=-1)`."""
    counts = torch.full((x.shape[-1],), 2, dtype=torch.int64)
    front = x.transpose(0, -1)
    wide = front.unsqueeze(1).expand(-1, counts.max(), *front.shape[1:])
    return wide[torch.arange(counts.max()) < counts.unsqueeze(1)].transpose(0, -1)


class Attention(nn.Module):
    """Rotated query and key."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.key = nn.Embedding(50, N * D), nn.Linear(N * D, NKV * D)
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, R, 2) / R))
        angles = torch.arange(64)[:, None] * self.inv_freq
        self.register_buffer("sincos", torch.cat((angles.sin(), angles.cos()), dim=-1))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        batch, length = input_ids.shape
        x = self.embed(input_ids)
        query = x.view(batch, length, N, D).transpose(1, 2)
        key = self.key(x).view(batch, length, NKV, D).transpose(1, 2)
        return self.rotate(query, position_ids), self.rotate(key, position_ids)

    def compute_angles(self, position_ids: Tensor) -> Tensor:
        inv_freq = self.inv_freq[None, :, None].expand(position_ids.shape[0], -1, 1)
        return (inv_freq @ position_ids[:, None, :].float()).transpose(1, 2)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor, turned: Tensor) -> Tensor:
        return torch.cat((x[..., :R] * cos + turned * sin, x[..., R:]), dim=-1)


class Cohere(Attention):
    """Angles repeated: ConstantOfShape, Expand, GatherND between two Transpose."""

    def rotate(self, x: Tensor, position_ids: Tensor) -> Tensor:
        angles = repeat_channels(self.compute_angles(position_ids))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return self.turn(x, cos, sin, rotate_pairs(x[..., :R]))


class Glm(Attention):
    """Repeated in every layer, and cut where the tables end, whose width it computes."""

    def rotate(self, x: Tensor, position_ids: Tensor) -> Tensor:
        angles = self.compute_angles(position_ids)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        cos, sin = (repeat_channels(t[..., : t.shape[-1] // 2]) for t in (cos, sin))
        width = cos.shape[-1]
        head, tail = x[..., :width], x[..., width:]
        return torch.cat((head * cos + rotate_pairs(head) * sin, tail), dim=-1)


class GptJ(Attention):
    """A table repeated over the batch (Tile), of which GatherElements picks rows."""

    def rotate(self, x: Tensor, position_ids: Tensor) -> Tensor:
        table = self.sincos.repeat(position_ids.shape[0], 1, 1)
        rows = position_ids[..., None].repeat(1, 1, table.shape[-1])
        sin, cos = torch.gather(table, 1, rows).chunk(2, dim=-1)
        sin, cos = (torch.repeat_interleave(t[:, :, None, :], 2, 3) for t in (sin, cos))
        x = x.transpose(1, 2)
        return self.turn(x, cos, sin, rotate_pairs(x[..., :R])).transpose(1, 2)


class Esm(Attention):
    """Tables of the whole length, cut to that of x."""

    def rotate(self, x: Tensor, position_ids: Tensor) -> Tensor:
        steps = torch.arange(x.shape[-2]).type_as(self.inv_freq)
        angles = torch.einsum("i,j->ij", steps, self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = (t[None, None][:, :, : x.shape[-2], :] for t in (angles.cos(), angles.sin()))
        return self.turn(x, cos, sin, rotate_half(x[..., :R]))


KINDS = pytest.mark.parametrize("kind", [Cohere, Glm, GptJ, Esm], ids=lambda kind: kind.__name__)


def write_rotation(kind: type[Attention], file: Path) -> nn.Module:
    """Write a module by torch's old exporter, and return it."""
    model = kind().eval()
    names = ["input_ids", "position_ids"]
    ids, positions = torch.ones(2, 5, dtype=torch.int64), torch.arange(5).repeat(2, 1)
    with quiet_torch(), reuse_translations():
        torch.onnx.export(
            model, (ids, positions), file, dynamo=False, opset_version=18, input_names=names,
            dynamic_axes={name: {0: "batch_size", 1: "sequence_length"} for name in names},
        )  # fmt: skip
    return model


def check_outputs(model: nn.Module, fused: onnx.ModelProto, tolerance: float) -> None:
    """Compare a fused file with its module."""
    feeds = {"input_ids": torch.randint(0, 50, (3, 11)), "position_ids": torch.randint(64, (3, 11))}
    given = {i.name for i in fused.graph.input}
    got = run(fused, {name: feeds[name].numpy() for name in given})
    with torch.no_grad():
        want = model(*feeds.values())
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=tolerance)


@KINDS
def test_what_optimum_writes(tmp_path, kind):
    model = write_rotation(kind, tmp_path / "in.onnx")
    result = rotary_export.fuse(tmp_path / "in.onnx")
    nodes = 2 if kind is Esm else 1  # each of its calls computes its own tables
    assert (len(result.fused), result.nodes, result.why) == (2, nodes, ())
    check_outputs(model, result.model, 2e-6)


@KINDS
@pytest.mark.parametrize("keep_io_types", [True, False], ids=["float32 in and out", "float16"])
def test_what_optimum_writes_and_a_converter_made_float16(tmp_path, kind, keep_io_types):
    """Channels whose number is known from a shape: that of what is put back to float32."""
    model = write_rotation(kind, tmp_path / "in.onnx")
    half = convert_float_to_float16(onnx.load(tmp_path / "in.onnx"), keep_io_types=keep_io_types)
    result = rotary_export.fuse(half, float32_tables=True)
    nodes = 2 if kind is Esm else 1
    assert (len(result.fused), result.nodes, result.why) == (2, nodes, ())
    assert len(result.half_tables) == (0 if kind is GptJ else 2)  # its tables are stored
    check_outputs(model, result.model, 1e-2)


class WithPast(nn.Module):
    """A decoder of transformers with the tensors of its cache as inputs and outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, mask: Tensor, position_ids: Tensor, *past: Tensor):
        out = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=make_cache(past),
            use_cache=True,
        )
        layers = out.past_key_values.layers
        return (out.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


def write_decoder(file: Path, dynamo: bool) -> tuple[nn.Module, list[str]]:
    """Write a decoder with its cache; return it and the names of its inputs."""
    model = WithPast(make_model("llama")).eval()
    past = [torch.randn(2, 2, 5, 16) for _ in range(4)]
    mask = torch.ones(2, 8, dtype=torch.int64)
    inputs = (torch.ones(2, 3, dtype=torch.int64), mask, torch.arange(5, 8).repeat(2, 1), *past)
    caches = [f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}" for i in range(4)]
    names = ["input_ids", "attention_mask", "position_ids", *caches]
    with quiet_torch(), reuse_translations():
        if dynamo:
            batch, seq, rows = (torch.export.Dim(name) for name in ("batch", "seq", "past"))
            shapes = [{0: batch, 1: seq}, {0: batch, 1: torch.export.Dim.DYNAMIC}]
            shapes += [{0: batch, 1: seq}, tuple({0: batch, 2: rows} for _ in past)]
            program = torch.onnx.export(
                model, inputs, dynamo=True, dynamic_shapes=tuple(shapes), input_names=names,
                opset_version=23, verbose=False,
            )  # fmt: skip
            program.save(file)
        else:
            axes = {name: {0: "batch", 1: "seq"} for name in names[:3]}
            axes["attention_mask"] = {0: "batch", 1: "total"}
            axes |= {name: {0: "batch", 2: "past"} for name in caches}
            torch.onnx.export(
                model, inputs, file, dynamo=False, opset_version=18, input_names=names,
                dynamic_axes=axes,
            )  # fmt: skip
    return model, names


def make_step() -> tuple[Tensor, ...]:
    """One token after nine, at another batch than the traced one."""
    past = [torch.randn(3, 2, 9, 16) for _ in range(4)]
    ids, mask = torch.tensor([[5], [6], [7]]), torch.ones(3, 10, dtype=torch.int64)
    return ids, mask, torch.full((3, 1), 9), *past


EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["new exporter", "old exporter"])


@EXPORTERS
def test_a_decoder_with_a_cache(tmp_path, dynamo):
    file = tmp_path / "in.onnx"
    model, names = write_decoder(file, dynamo)
    result = rotary_export.fuse(file)
    assert (len(result.fused), result.nodes, result.why) == (4, 2, ())
    tried = {(c.shape.batch, c.shape.length, c.shape.past) for c in result.check.comparisons}
    assert tried == {(1, 7, 0), (3, 13, 5), (2, 1, 19)}
    feeds = make_step()
    got = run(result.model, {n: t.numpy() for n, t in zip(names, feeds, strict=True)})
    with torch.no_grad():
        want = model(*feeds)
    for ours, theirs in zip(got, want, strict=True):
        largest = theirs.abs().max().item()
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5 * largest)


def test_operators_of_onnx(tmp_path):
    file = tmp_path / "in.onnx"
    _, names = write_decoder(file, dynamo=True)
    plain = rotary_export.fuse(file)
    assert plain.check.notes == []
    result = rotary_export.fuse(file, operators="onnx")
    assert result.check.notes == [  # torch.onnx writes the norms and reshapes so by itself
        "2 attentions with groups of heads",
        "2 attentions that read the cache",
    ]
    feeds = {n: t.numpy() for n, t in zip(names, make_step(), strict=True)}
    for ours, theirs in zip(run(result.model, feeds), run(plain.model, feeds), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_operators_of_onnx_need_their_opset(tmp_path):
    file = tmp_path / "in.onnx"
    write_decoder(file, dynamo=False)
    with pytest.raises(RotaryExportError, match="requires a model of opset >= 23, got opset 18"):
        rotary_export.fuse(file, operators="onnx")
    with pytest.raises(RotaryExportError, match="must be 'onnx' or None, got 'ort'"):
        rotary_export.fuse(file, operators="ort")


@EXPORTERS
@pytest.mark.parametrize("keep_io_types", [True, False], ids=["float32 in and out", "float16"])
def test_a_decoder_that_onnx_runtime_s_converter_made_float16(tmp_path, dynamo, keep_io_types):
    """Unsorted nodes, float32 outputs of float16 arithmetic, and tables computed in float16."""
    file = tmp_path / "in.onnx"
    model, names = write_decoder(file, dynamo)
    half = convert_float_to_float16(onnx.load(file), keep_io_types=keep_io_types)
    with pytest.raises(CheckFailedError, match="tables computed in float16 in 4 of 4 rotary calls"):
        rotary_export.fuse(half)
    result = rotary_export.fuse(half, float32_tables=True)
    assert (len(result.fused), result.nodes, result.why) == (4, 2, ())
    assert "frequencies of base 10000" in result.check.notes[1]
    step = list(make_step())
    step[2] += 3000  # where float16 has every second position, and frequencies that are off
    floating = np.float32 if keep_io_types else np.float16
    feeds = {n: t.numpy() for n, t in zip(names, step, strict=True)}
    feeds = {n: t.astype(floating) if t.dtype.kind == "f" else t for n, t in feeds.items()}
    with torch.no_grad():
        want = model(*step)
    for ours, theirs in zip(run(result.model, feeds), want, strict=True):
        assert ours.dtype == floating
        largest = theirs.abs().max().item()
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-2 * largest)


@pytest.mark.parametrize("half", [D // 2, D // 4], ids=["full", "partial"])
def test_what_onnxruntime_genai_writes(half):
    """Its attention runs several new tokens after a cache for one row only, before and after."""
    result = rotary_export.fuse(write_genai(half=half))
    assert (len(result.fused), result.nodes, result.why) == (2, 1, ())
    assert {c.run_mode for c in result.check.comparisons} == {"as it is", "row by row"}
    (node,) = find_rotary(result.model)
    attributes = {a.name: a.i for a in node.attribute}
    assert attributes.pop("rotary_embedding_dim", D) == 2 * half
    assert attributes == {"num_heads": N, "kv_num_heads": NKV}


def test_rotation_inside_attention_stays_there():
    with pytest.raises(CheckFailedError, match="GroupQueryAttention rotates inside"):
        rotary_export.fuse(write_genai(do_rotary=True))


def test_a_file_whose_outputs_nobody_computes():
    """onnxruntime-genai 0.18 writes such files for float32 on CUDA and DirectML."""
    model = write_genai()
    model.graph.output.append(onnx.helper.make_tensor_value_info("present.1.key", 10, None))
    message = "the model is damaged: no node computes its output present.1.key"
    with pytest.raises(RotaryExportError, match=message):
        rotary_export.fuse(model)
