"""Count how often ONNX Runtime lets the op write over its inputs, in models that we export.

Small decoders of 2 to 12 layers are exported with dynamic batch and length as a user's would be,
and run. Every fused node has two outputs, and each may alias its input if that is an intermediate
result without another reader.

Needs a C++ compiler. Exit codes: 0 fine, 1 fewer than 95 % are in place.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from rotary_export import RotaryEmbedding, RotaryQueryKey, rotary_embedding
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.cli.terminal import Terminal
from rotary_export.exporters.onnx import export_onnx
from rotary_export.graphs.graph import Graph
from rotary_export.op import library as op_library
from rotary_export.op import spec

ROOT = Path(__file__).parents[2]
ROWS, WIDTH, HEAD_DIM = 64, 64, 16
STYLES = ("heads", "flat", "fused-qkv", "second-reader")
LAYERS = (2, 6, 12)
OPSETS = (18, 23)
ASKED = 0.95


class Attention(nn.Module):
    """Attention with grouped queries, its rope in one of the STYLES that models have.

    "heads" rotates (B, N, S, H), "flat" (B, S, N*H) as it comes from the projection; "fused-qkv"
    splits one projection; "second-reader" is "flat", and something after rope reads that key, too
    (what reads it before rope does not keep ORT from writing over it).
    """

    def __init__(self, style: str, num_heads: int, kv_num_heads: int) -> None:
        super().__init__()
        self.style = style
        self.heads = (num_heads, kv_num_heads)
        self.widths = [n * HEAD_DIM for n in (num_heads, kv_num_heads, kv_num_heads)]
        self.qkv = nn.Linear(WIDTH, sum(self.widths))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, width) for width in self.widths)
        self.out = nn.Linear(num_heads * HEAD_DIM, WIDTH)

    def forward(self, x: Tensor, rope: RotaryQueryKey, position_ids: Tensor) -> Tensor:
        """Attend from (B, S, WIDTH) to itself, causally."""
        if self.style == "fused-qkv":
            query, key, value = self.qkv(x).split(self.widths, -1)
        else:
            query, key, value = (project(x) for project in self.projections)
        before = key

        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

        if self.style in ("flat", "second-reader"):
            tables = rope.cos_cache, rope.sin_cache
            heads = dict(zip(("num_heads", "kv_num_heads"), self.heads, strict=True))
            query, key = rotary_embedding(query, *tables, position_ids, key, **heads)
            query, key = split(query), split(key)
        else:
            query, key = rope(split(query), split(key), position_ids)
        groups = self.heads[0] // self.heads[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, split(value)))
        y = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        y = self.out(y.transpose(1, 2).flatten(2))
        if self.style == "second-reader":
            y = y + (before * y[..., : before.shape[-1]]).sum(-1, keepdim=True).tanh()
        return y


class Decoder(nn.Module):
    """Layers of attention and a small MLP, around one rope."""

    def __init__(self, style: str, layers: int) -> None:
        super().__init__()
        self.rope = RotaryQueryKey(RotaryEmbedding(HEAD_DIM, max_seq_len=ROWS))
        self.layers = nn.ModuleList(Attention(style, 4, 2) for _ in range(layers))
        self.mlps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """Run on (B, S, WIDTH) and (B, S)."""
        for attention, mlp in zip(self.layers, self.mlps, strict=True):
            normal = nn.functional.layer_norm(hidden, (WIDTH,))
            hidden = hidden + attention(normal, self.rope, position_ids)
            normal = nn.functional.layer_norm(hidden, (WIDTH,))
            hidden = hidden + nn.functional.silu(mlp(normal))
        return hidden


@dataclass(frozen=True)
class Count:
    """What was counted in one model.

    Attributes:
        style: Of its attention.
        layers: How many.
        opset: Of ai.onnx.
        nodes: Fused nodes.
        outputs: Of these.
        eligible: Outputs whose input is an intermediate result that nothing else reads.
        aliased: Outputs that ORT put over their inputs.
    """

    style: str
    layers: int
    opset: int
    nodes: int
    outputs: int
    eligible: int
    aliased: int


def export_decoder(style: str, layers: int, opset: int, file: Path) -> Decoder:
    """Export a decoder with dynamic batch_size and seq_len."""
    torch.manual_seed(0)
    decoder = Decoder(style, layers).eval()
    shape = ("batch_size", "seq_len")
    hidden = TensorInfo("hidden", "float32", (*shape, WIDTH))
    ids = TensorInfo("position_ids", "int64", shape, (0, ROWS - 1))
    out = TensorInfo("hidden_out", "float32", (*shape, WIDTH))
    graph = Graph("model", decoder, (hidden, ids), (out,))
    example = graph.make_inputs({"batch_size": 2, "seq_len": 5})
    with torch.no_grad():
        export_onnx(graph, example, file, opset)
    return decoder


def count_eligible(model: onnx.ModelProto) -> tuple[int, int]:
    """Return the fused nodes of a model, and their inputs that nothing else reads."""
    readers = [name for node in model.graph.node for name in node.input]
    readers += [value.name for value in model.graph.output]
    made = {name for node in model.graph.node for name in node.output}
    fused = [n for n in model.graph.node if (n.domain, n.op_type) == (spec.DOMAIN, spec.OP_TYPE)]
    rotated = [node.input[i] for node in fused for i in (0, 4) if node.input[i]]
    return len(fused), sum(name in made and readers.count(name) == 1 for name in rotated)


def build_probe(folder: Path) -> Path:
    """Compile the probe; return its path."""
    library = folder / "probe.so"
    command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += [f'-DROTARY_EXPORT_LIBRARY="{op_library.op_library_path()}"']
    command += ["-I", str(ROOT / "rotary_export" / "csrc")]
    command += [str(Path(__file__).with_name("in_place_probe.cc")), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return library


def count_in_place(style: str, layers: int, opset: int, probe: Path, folder: Path) -> Count:
    """Export a decoder, run it at three shapes, and count; its results are checked, too."""
    file = folder / f"{style}-{layers}-{opset}.onnx"
    decoder = export_decoder(style, layers, opset, file)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(probe))
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    counters = ctypes.CDLL(str(probe))
    for name in ("CountOutputs", "CountAliased"):
        getattr(counters, name).restype = ctypes.c_int64
        getattr(counters, name)()
    outputs = aliased = 0
    for batch_size, seq_len in ((1, 1), (3, 7), (1, 64)):
        hidden = torch.randn(batch_size, seq_len, WIDTH)
        ids = torch.arange(seq_len).repeat(batch_size, 1)
        (got,) = session.run(None, {"hidden": hidden.numpy(), "position_ids": ids.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, decoder(hidden, ids).numpy(), rtol=1e-3, atol=1e-4)
        counted = counters.CountOutputs(), counters.CountAliased()
        outputs = counted[0]
        aliased = min(aliased or counted[1], counted[1])
    nodes, eligible = count_eligible(onnx.load(file))
    return Count(style, layers, opset, nodes, outputs, eligible, aliased)


def count_all(layers: tuple[int, ...] = LAYERS) -> Iterator[Count]:
    """Count in every style, length and opset."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        probe = build_probe(folder)
        for style in STYLES:
            for opset in OPSETS:
                for number in layers:
                    yield count_in_place(style, number, opset, probe, folder)


def main() -> int:
    """Count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    terminal = Terminal(as_json=parser.parse_args().json)
    with terminal.progress() as progress:
        progress("export and run decoders")
        counts = list(count_all())
    rows = [list(asdict(count).values()) for count in counts]
    terminal.table(list(asdict(counts[0])), rows)
    eligible, aliased = (sum(getattr(c, n) for c in counts) for n in ("eligible", "aliased"))
    share = aliased / eligible
    terminal.line(f"in place: {aliased} of {eligible} ({share:.1%}; asked: {ASKED:.0%})")
    terminal.finish({"share": share, "asked": ASKED, "models": [asdict(c) for c in counts]})
    return int(share < ASKED)


if __name__ == "__main__":
    sys.exit(main())
