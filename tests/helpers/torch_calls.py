"""Calls of the torch op."""

from __future__ import annotations

import torch
from helpers.cases import Case
from helpers.oracles import Tensors
from torch import Tensor

from rotary_export.op import spec

OP = torch.ops.rotary_export.rotary_embedding


def order(inputs: Tensors) -> list[Tensor | None]:
    """Return the inputs in the op's order."""
    return [inputs.get(name) for name in spec.INPUTS]


def run(case: Case, inputs: Tensors) -> list[Tensor]:
    y, key_out = OP(*order(inputs), **case.torch_options)
    if not case.kv_heads:
        assert key_out.shape == (0,)
    return [y, key_out] if case.kv_heads else [y]
