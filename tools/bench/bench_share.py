"""Rope's share of a decoder layer, for tools/bench/bench.py.

Layers are in float32 and without the embeddings and the last projection, so that the share of the
whole model is somewhat smaller. Timed apart from each other are the layer without rope, and rope
alone (as (chain - one node) / (length - 1)): the difference of the layer with and without it would
drown in the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bench_cases import Times, time_on, time_per_node
from bench_graphs import OURS, PEERS, PRIMITIVES, BenchCase, Runner, finish_model
from onnx import ModelProto, NodeProto, helper
from torch import Tensor

HEAD_DIM = 64
CONTEXT = 512  # keys that a query sees
PHASES = {"prefill of 512 tokens": (CONTEXT, 5), "decode of 1 token": (1, 65)}  # tokens, chain


@dataclass(frozen=True)
class Sizes:
    """Of a decoder layer."""

    hidden: int
    mlp: int
    num_heads: int
    kv_num_heads: int


MODELS = {"1B": Sizes(2048, 8192, 32, 8), "135M": Sizes(576, 1536, 9, 3)}  # parameters of the whole
SHARE_CASES = {f"share, {m}, {phase}": (m, phase) for m in MODELS for phase in PHASES}


@dataclass(frozen=True)
class Share:
    """Rope's part of the time of a layer.

    Attributes:
        model: Key of MODELS.
        phase: Key of PHASES.
        op: What rotates.
        share: rope / (rope + layer without rope).
        times: Seconds of "rope" and "layer".
    """

    model: str
    phase: str
    op: str
    share: float
    times: Times

    def to_dict(self) -> dict[str, object]:
        """Return the share as JSON accepts it."""
        seconds = {name: spread.to_dict() for name, spread in self.times.items()}
        share = float(f"{self.share:.3g}")
        names = {"model": self.model, "phase": self.phase, "op": self.op}
        return {**names, "share": share, "seconds": seconds}


class _Layer:
    """Nodes and weights of a decoder layer, written in order."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Tensor] = {}

    def add(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def constant(self, value: Tensor) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def project(self, x: str, width: int, out: int) -> str:
        return self.add("MatMul", x, self.constant(torch.randn(width, out) / width**0.5))

    def normalize(self, x: str) -> str:
        return self.add("RMSNormalization", x, self.constant(torch.ones(self.sizes.hidden)))

    def split_heads(self, x: str, heads: int) -> str:
        shape = self.constant(torch.tensor([1, -1, heads, HEAD_DIM]))
        return self.add("Transpose", self.add("Reshape", x, shape), perm=[0, 2, 1, 3])


def make_layer(sizes: Sizes, tokens: int) -> tuple[ModelProto, dict[str, Tensor]]:
    """Write a layer without rope; decode reads keys and values of the tokens before.

    Args:
        sizes: Of the layer.
        tokens: New ones: CONTEXT for a prefill, 1 in decode.

    Returns:
        The model and its inputs.
    """
    layer = _Layer(sizes)
    hidden, kv_heads = sizes.hidden, sizes.kv_num_heads
    inputs = {"x": torch.randn(1, tokens, hidden)}
    normal = layer.normalize("x")
    query = layer.split_heads(layer.project(normal, hidden, hidden), sizes.num_heads)
    cached = []
    for name in ("past_key", "past_value"):
        value = layer.split_heads(layer.project(normal, hidden, kv_heads * HEAD_DIM), kv_heads)
        if tokens < CONTEXT:
            inputs[name] = torch.randn(1, kv_heads, CONTEXT - tokens, HEAD_DIM)
            value = layer.add("Concat", name, value, axis=2)
        cached.append(value)
    # Attention; a group of queries shares a key: (1, Nkv, N / Nkv * tokens, H).
    grouped = layer.constant(torch.tensor([1, kv_heads, -1, HEAD_DIM]))
    query = layer.add("Reshape", query, grouped)
    scores = layer.add("MatMul", query, layer.add("Transpose", cached[0], perm=[0, 1, 3, 2]))
    context = layer.add("MatMul", layer.add("Softmax", scores, axis=-1), cached[1])
    heads = layer.constant(torch.tensor([1, sizes.num_heads, -1, HEAD_DIM]))
    context = layer.add("Transpose", layer.add("Reshape", context, heads), perm=[0, 2, 1, 3])
    context = layer.add("Reshape", context, layer.constant(torch.tensor([1, -1, hidden])))
    x = layer.add("Add", "x", layer.project(context, hidden, hidden))
    # MLP.
    normal = layer.normalize(x)
    gate = layer.project(normal, hidden, sizes.mlp)
    gate = layer.add("Mul", gate, layer.add("Sigmoid", gate))
    up = layer.add("Mul", gate, layer.project(normal, hidden, sizes.mlp))
    x = layer.add("Add", x, layer.project(up, sizes.mlp, hidden))
    outputs = {x: [1, tokens, hidden]}
    model = finish_model(layer.nodes, inputs, layer.constants, outputs, torch.float32, "")
    return model, inputs


def measure_shares(model: str, phase: str, seconds: float) -> list[Share]:
    """Measure rope's share with our op, with ORT's and with primitives.

    Args:
        model: Key of MODELS.
        phase: Key of PHASES.
        seconds: About how long each of the two measurements may take.
    """
    sizes = MODELS[model]
    tokens, chain = PHASES[phase]
    layer = time_on(1, {"layer": Runner(*make_layer(sizes, tokens), threads=1)}, seconds)["layer"]
    case = BenchCase(1, sizes.num_heads, sizes.kv_num_heads, tokens, HEAD_DIM)
    ops = {op: {"op": op} for op in (OURS, *PEERS, PRIMITIVES)}
    shares = []
    for op, rope in time_per_node(case, ops, chain, seconds).items():
        share = rope.median / (rope.median + layer.median)
        shares.append(Share(model, phase, op, share, {"rope": rope, "layer": layer}))
    return shares
