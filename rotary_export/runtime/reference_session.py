"""Sessions that the ONNX reference evaluator runs: slow, every type included, no ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rotary_export.bundle.manifest import GraphInfo
from rotary_export.compat.onnx_evaluator import WideEvaluator
from rotary_export.errors import explain_damage
from rotary_export.op.onnx_reference import RotaryEmbedding
from rotary_export.runtime.session import Session, Tensors
from rotary_export.runtime.tensors import make_dtype, to_numpy, to_torch


class ReferenceSession(Session):
    """An `.onnx` file, run by onnx.reference with our op in numpy."""

    def __init__(self, file: Path, graph_name: str, graph: GraphInfo) -> None:
        super().__init__(graph_name, graph, ("onnx.reference",), "reference")
        with explain_damage(f"onnx.reference can't load {file.name}"):
            self._evaluator = WideEvaluator(str(file), new_ops=[RotaryEmbedding])

    def _run(self, inputs: Tensors, sizes: Mapping[str, int], wants_torch: bool) -> dict[str, Any]:
        del sizes
        feeds = {name: to_numpy(value) for name, value in inputs.items()}
        with explain_damage(f"onnx.reference can't run {self.graph_name}"):
            results: Any = self._evaluator.run(None, feeds)
        outputs = {}
        for info, value in zip(self.graph.outputs, results, strict=True):
            array = np.asarray(value).astype(make_dtype(info.dtype), copy=False)
            outputs[info.name] = to_torch(array) if wants_torch else array
        return outputs
