"""Kinds of rotary embeddings, exported, proven, and compared at sizes that were not traced."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rotary_export import export_model, load
from rotary_export.errors import CheckFailedError

HEADS, H = 2, 8
WIDTH = HEADS * H
FREQUENCIES = 100.0 ** -(torch.arange(0, H, 2) / H)


def half_turn(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def tile(angles):
    return torch.cat((angles, angles), -1)


class Attention(nn.Module):
    """Attention over tokens x (B, S, WIDTH); `turn` rotates queries and keys (B, N, S, H)."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def find_angles(self, rows):
        return tile(torch.arange(rows)[:, None] * FREQUENCIES)

    def turn(self, x, angles):
        raise NotImplementedError

    def forward(self, x):
        heads = self.project(x).unflatten(-1, (3, HEADS, H)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        angles = self.find_angles(x.shape[1])
        query, key = self.turn(query, angles), self.turn(key, angles)
        mixed = scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(2)


def script(function):
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return torch.jit.script(function)


@script
def apply_rotary_first(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """Rotate part of x (S, B, N, H) by pairs; cache is (S, B, R/2, 2). Sizes are read in it."""
    rows, batch, heads = x.size(0), x.size(1), x.size(2)
    width = cache.shape[-2] * 2
    x, rest = x[..., :width], x[..., width:]
    pairs = x.reshape(rows, batch, heads, width // 2, 2)
    cache = cache[:rows].view(rows, -1, 1, width // 2, 2)
    first = pairs[..., 0] * cache[..., 0] - pairs[..., 1] * cache[..., 1]
    second = pairs[..., 1] * cache[..., 0] + pairs[..., 0] * cache[..., 1]
    return torch.cat((torch.stack((first, second), -1).flatten(3), rest), -1)


class Scripted(Attention):
    def turn(self, x, angles):
        angles = angles[:, None, : H // 4]
        cache = torch.stack((angles.cos(), angles.sin()), -1).expand(-1, x.shape[0], -1, -1)
        return apply_rotary_first(x.permute(2, 0, 1, 3), cache).permute(1, 2, 0, 3)


class Processor:
    """Rotates by a function of its own."""

    def __call__(self, x, angles):
        cos, sin = angles.cos(), angles.sin()

        def apply_rotary_emb(x):
            return x * cos + half_turn(x) * sin

        return apply_rotary_emb(x)


class Processed(Attention):
    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def turn(self, x, angles):
        return self.processor(x, angles)


def apply_rot_embed(x, angles):
    return x * angles.cos() + half_turn(x) * angles.sin()


class Learned(Attention):
    def __init__(self):
        super().__init__()
        self.frequencies = nn.Parameter(FREQUENCIES.clone())

    def find_angles(self, rows):
        return tile(torch.arange(rows)[:, None] * self.frequencies)

    def turn(self, x, angles):
        return apply_rot_embed(x, angles)


class Promoted(Attention):
    def turn(self, x, angles):
        return apply_rot_embed(x, angles).to(x.dtype)


class Scaled(Attention):
    """Pairs are rotated; halves are scaled."""

    def find_angles(self, rows):
        return (torch.arange(rows)[:, None] * FREQUENCIES).repeat_interleave(2, -1)

    def turn(self, x, angles):
        power = torch.arange(x.shape[2])[:, None] / 64
        return rotate_pairs(x, angles, tile((0.3 + FREQUENCIES) ** power))


def rotate_pairs(x, angles, scale):
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return (x * angles.cos() + turned * angles.sin()) * scale


class Assigned(Attention):
    """Channels are assigned to slices of a new tensor, inside a method."""

    def find_angles(self, rows):
        return torch.arange(rows)[:, None] * FREQUENCIES

    def turn(self, x, angles):
        def apply_rotary(x):
            even, odd, out = x[..., 0::2], x[..., 1::2], torch.empty_like(x)
            out[..., 0::2] = even * angles.cos() - odd * angles.sin()
            out[..., 1::2] = even * angles.sin() + odd * angles.cos()
            return out

        return apply_rotary(x)


class Packed(Attention):
    """Heads are split inside the function."""

    def turn(self, x, angles):
        rotated = rotate_packed(x.transpose(1, 2).flatten(2), angles)
        return rotated.unflatten(-1, (HEADS, H)).transpose(1, 2)


def rotate_packed(x, angles):
    """Rotate x (B, S, N*H), the sequence first."""
    heads = x.view(x.shape[0], x.shape[1], HEADS, H).transpose(0, 1)
    heads = apply_rot_embed(heads, angles[:, None, None])
    return heads.transpose(0, 1).reshape(x.shape)


class OfHeads(Attention):
    """Angles differ from head to head."""

    def find_angles(self, rows):
        return super().find_angles(rows) * torch.tensor([1.0, 1.5])[:, None, None]

    def turn(self, x, angles):
        return apply_rot_embed(x, angles)


class Autocast(Attention):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def turn(self, x, angles):
        return apply_rot_embed(x, angles)

    def forward(self, x):
        with torch.autocast("cpu", self.dtype):
            return super().forward(x).float()


class Inline(Attention):
    def turn(self, x, angles):
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


class TwoLayers(Inline):
    """Rotates twice, and the second time what the first attention returned."""

    def forward(self, x):
        return super().forward(super().forward(x))


class Windows(Attention):
    """Attention in windows of 4 tokens: positions start anew in each, tables are constants."""

    def find_angles(self, rows):
        return super().find_angles(4)

    def turn(self, x, angles):
        return apply_rot_embed(x, angles)

    def forward(self, x):
        rows, count = x.shape[1], -(-x.shape[1] // 4)
        x = nn.functional.pad(x, (0, 0, 0, 4 * count - rows))
        windows = x.reshape(x.shape[0] * count, 4, WIDTH)
        return super().forward(windows).reshape(x.shape[0], 4 * count, WIDTH)[:, :rows]


class Video(nn.Module):
    """x (B, frames, rows, columns, N*H), rotated by frame, row and column, heads before them."""

    def forward(self, x):
        axes = [torch.arange(size) for size in x.shape[1:4]]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        angles = (places[..., None] * FREQUENCIES[:1]).flatten(-2)  # (frames, rows, columns, 3)
        heads = x.unflatten(-1, (HEADS, H)).movedim(-2, 1)
        width = 2 * angles.shape[-1]
        rotated = apply_rot_embed(heads[..., :width], tile(angles))
        return torch.cat((rotated, heads[..., width:]), -1)


def tokens(batch, rows, dtype=torch.float32):
    return {"x": torch.randn(batch, rows, WIDTH, dtype=dtype)}


KINDS = {
    "scripted, sequence first": (Scripted, "interleaved, channels 0 to 4, SBNH"),
    "nested in a processor": (Processed, "half, channels 0 to 8, BNSH"),
    "learned": (Learned, "half, channels 0 to 8, BNSH"),
    "promoted": (Promoted, "half, channels 0 to 8, BNSH"),
    "scaled": (Scaled, "interleaved, channels 0 to 8, BNSH, times a factor of each channel"),
    "assigned to slices": (Assigned, "interleaved, channels 0 to 8, BNSH"),
    "heads split inside": (Packed, "half, channels 0 to 8, BS(NH)"),
    "angles of each head": (OfHeads, "half, channels 0 to 8, BSSH"),
    "autocast": (lambda: Autocast(torch.float16), "half, channels 0 to 8, BNSH"),
    "autocast, bfloat16": (lambda: Autocast(torch.bfloat16), "half, channels 0 to 8, BNSH"),
    "inline": (Inline, "primitives, half"),
}
SESSIONS = (
    {},
    {"use_op_library": False},
    {"runtime": "torchscript", "allow_code": True},
    {"runtime": "program", "allow_code": True},
)


def compare(bundle, model, inputs, tolerance=1e-5):
    """Compare every session with the model; ONNX Runtime's CPU has no bfloat16 kernels."""
    with torch.no_grad():
        want = model(**inputs).numpy()
    is_bfloat16 = getattr(model, "dtype", None) == torch.bfloat16
    for options in SESSIONS[2:] if is_bfloat16 else SESSIONS:
        got = load(bundle, "model", **options)(**inputs)["output"].numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * abs(want).max())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.filterwarnings("ignore")
def test_is_fused_and_equal_to_eager(tmp_path, kind):
    make, rotation = kind
    torch.manual_seed(0)
    model = make().eval()
    dtype = torch.float16 if make is Promoted else torch.float32
    model.to(dtype)
    bundle = export_model(model, tokens(2, 6, dtype), tmp_path / "bundle", quick=True)
    (finding,) = bundle.manifest.config["rotary"]
    assert (finding["calls"], finding["fused"], finding["rotation"]) == (2, 2, rotation)
    nodes = [n.op_type for n in onnx.load(bundle.path / "model.onnx").graph.node]
    assert nodes.count("RotaryEmbedding") == bundle.manifest.graphs["model"].rotary_nodes
    assert 1 <= nodes.count("RotaryEmbedding") <= 2
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(
        getattr(model, "dtype", dtype), 1e-5
    )
    compare(bundle, model, tokens(3, 23, dtype), tolerance)


@pytest.mark.filterwarnings("ignore")
def test_constant_tables_of_windows(tmp_path):
    model = Windows().eval()
    bundle = export_model(model, tokens(2, 6), tmp_path / "bundle", formats=["onnx"])
    assert "tables" in {row.graph for row in bundle.report.rows}
    x = tokens(3, 23)["x"]
    got = load(bundle, "model")(x=x)["output"]
    torch.testing.assert_close(got, model(x).detach(), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_inline_nodes_are_counted_one_by_one(tmp_path):
    model = TwoLayers().eval()
    path = tmp_path / "bundle"
    bundle = export_model(model, tokens(2, 6), path, formats=["onnx"], quick=True)
    nodes = [n.op_type for n in onnx.load(path / "model.onnx").graph.node]
    assert bundle.manifest.graphs["model"].rotary_nodes == nodes.count("RotaryEmbedding") == 2


@pytest.mark.filterwarnings("ignore")
def test_a_video_of_any_size(tmp_path):
    shapes = {"x": {0: "b", 1: "frames", 2: "rows", 3: "columns"}}
    model, inputs = Video().eval(), {"x": torch.randn(2, 3, 4, 5, WIDTH)}
    path = tmp_path / "bundle"
    bundle = export_model(model, inputs, path, dynamic_shapes=shapes, quick=True)
    (finding,) = bundle.manifest.config["rotary"]
    assert finding["rotation"] == "half, channels 0 to 6, BNSSSH"
    compare(bundle, model, {"x": torch.randn(1, 6, 3, 7, WIDTH)})


@pytest.mark.filterwarnings("ignore")
def test_what_is_inline_is_fused_in_the_onnx_file_alone(tmp_path):
    model = Inline().eval()
    with pytest.raises(CheckFailedError, match=r"Inline applies no .* add 'onnx' to formats, got"):
        export_model(model, tokens(2, 6), tmp_path / "none", formats=["program"])
    bundle = export_model(model, tokens(2, 6), tmp_path / "bundle", formats=["onnx"])
    (finding,) = bundle.manifest.config["rotary"]
    assert finding["function"] == "no function; inline, in model.onnx alone"
    assert "no function" in bundle.report.unverified["tables at far positions"]
    assert "tables" not in {row.graph for row in bundle.report.rows}
    session = load(bundle, "model")
    assert session.kernel_path.startswith("fused")


class Straight(Attention):
    """Rotates nothing."""

    def turn(self, x, angles):
        return x * 2


class Counted(Straight):
    def forward(self, x):
        return super().forward(x) * int(x.shape[1])


class Masked(Attention):
    def turn(self, x, angles):
        return rotate_masked(x, angles)


def rotate_masked(x, angles):
    """Rotate by an angle that differs within a pair."""
    return x * angles.cos() + half_turn(x) * (angles * torch.arange(1, H + 1)).sin()


def test_the_message_says_what_was_found(tmp_path):
    inline = "; nor does its ONNX graph: the model has no rotary embedding that fuse recognises"
    with pytest.raises(CheckFailedError, match=rf"Straight applies no rotary embedding.*{inline}"):
        export_model(Straight().eval(), tokens(2, 6), tmp_path / "none", formats=["onnx"])
    masked = r"none of the 2 rotary calls of Masked .*rotate_masked: in no layout.*; nor does its"
    with pytest.raises(CheckFailedError, match=masked):
        export_model(Masked().eval(), tokens(2, 6), tmp_path / "none", formats=["onnx"])
    counted = r"Counted applies no .* inline is not known, .*: tracing specialises seq_len"
    with pytest.raises(CheckFailedError, match=counted):
        export_model(Counted().eval(), tokens(2, 6), tmp_path / "none", formats=["onnx"])
    assert not list(tmp_path.iterdir())
