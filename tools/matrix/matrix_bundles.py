"""The bundles that each release of ONNX Runtime runs, their inputs, and what eager returns."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import rotary_export
from rotary_export.bundle.manifest import read_manifest

ROOT = Path(__file__).parents[2]
OPSETS = (18, 21, 22, 23, 24)
COMMITTED = ("plain", "interleaved-partial", "xpos")
BITS = "bits"  # the outcome of a run that has the bits of eager


def make_bundles(folder: Path) -> list[str]:
    """Write the bundles; beside each graph its inputs and the outputs of eager PyTorch.

    Returns:
        Their names.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for opset in OPSETS:
        rope = rotary_export.RotaryEmbedding(16, use_xpos=True, max_seq_len=32)
        path = folder / f"module, opset {opset}"
        rotary_export.export(rope, path, head_dim=24, opset=opset, formats=("onnx", "torchscript"))
        _write_module_runs(path)
        _write_model(folder / f"llama, opset {opset}", opset)
    for name in COMMITTED:
        shutil.copytree(ROOT / "exported" / name, folder / f"exported, {name}")
        _write_module_runs(folder / f"exported, {name}")
    return sorted(path.name for path in folder.iterdir())


def _write_module_runs(path: Path) -> None:
    """Write what the TorchScript files return: they are eager's operators."""
    for name, graph in read_manifest(path).graphs.items():
        generator = torch.Generator().manual_seed(0)
        inputs = {}
        for info in graph.inputs:
            sizes = {"batch_size": 2, "seq_len": 7}
            shape = [d if isinstance(d, int) else sizes.get(d, 4) for d in info.shape]
            if info.name == "seq_len":
                inputs[info.name] = torch.tensor(9)
            elif info.dtype == "int64":
                inputs[info.name] = torch.randint(0, 16, shape, generator=generator)
            else:
                inputs[info.name] = torch.randn(shape, generator=generator)
        outputs = torch.jit.load(path / f"{name}.pt")(*inputs.values())
        names = [info.name for info in graph.outputs]
        _write_run(path / name, inputs, dict(zip(names, outputs, strict=True)))


def make_llama() -> LlamaForCausalLM:
    """Make a llama of two layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_llama_inputs(batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """Make token ids, a mask of ones, and positions that count up."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(0, 99, (batch_size, seq_len), generator=generator),
        "attention_mask": torch.ones(batch_size, seq_len, dtype=torch.int64),
        "position_ids": torch.arange(seq_len).expand(batch_size, -1).contiguous(),
    }


def _write_model(path: Path, opset: int) -> None:
    model = make_llama()
    inputs = make_llama_inputs(2, 7)
    rotary_export.export_model(model, inputs, path, opset=opset, formats=["onnx"], quick=True)
    inputs = make_llama_inputs(3, 19)
    _write_run(path / "model", inputs, {"logits": model(**inputs).logits})


def _write_run(base: Path, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    for kind, tensors in (("in", inputs), ("want", outputs)):
        np.savez(f"{base}.{kind}.npz", **{name: t.numpy() for name, t in tensors.items()})
