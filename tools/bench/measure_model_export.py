#!/usr/bin/env python
"""How much finding and replacing rotary embeddings adds to the time of exporting a model as ONNX.

Exports by turns as the model is, and with its rotary calls found and replaced; prints the medians
of the processor time and their ratio. The proof is not part of either.

    python tools/bench/measure_model_export.py --json tools/results/model_export.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.measure.machine import describe_machine
from rotary_export.models.analyze import analyze_model
from rotary_export.models.find.replace import replace_calls
from rotary_export.models.find.replacement import find_replacement
from rotary_export.models.trace.program import get_outputs, name_shape, name_symbols, trace_program
from rotary_export.models.trace.snapshot import take_snapshot
from rotary_export.models.write_onnx import MAX_INLINE_BYTES, write_onnx

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.tiny_models import make_inputs, make_model


def export(analysis, path, fused):
    """Export once; return the processor seconds."""
    started = time.process_time()
    tensors = analysis.traced.tensors
    context = nullcontext()
    if fused:
        found = find_replacement(analysis.flat.model, lambda: analysis.flat(*tensors))
        context = replace_calls(found)
    with torch.no_grad(), context:
        program = trace_program(analysis.flat, tensors, analysis.inputs)
    symbols = name_symbols(program, analysis.inputs)
    outputs = tuple(
        TensorInfo("logits", "float32", name_shape(value.shape, symbols, "logits"))
        for value in get_outputs(program)
    )
    graph = GraphInfo(analysis.inputs, outputs, {})
    write_onnx(program, graph, symbols, path, 23, MAX_INLINE_BYTES)
    return time.process_time() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model("llama", num_hidden_layers=options.layers)
    seconds = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder, take_snapshot(model) as snapshot:
        analysis = analyze_model(model, make_inputs(model), "auto", snapshot, lambda step: None)
        for round_ in range(options.rounds + 1):
            for fused in (False, True):
                taken = export(analysis, Path(folder) / "model.onnx", fused)
                if round_:  # the first warms up
                    seconds[fused].append(taken)
    plain, ours = (statistics.median(seconds[fused]) for fused in (False, True))
    ratios = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
    print(f"llama, {options.layers} layers, {options.rounds} rounds, processor seconds")
    print(f"plain export {plain:.2f}, with rotary {ours:.2f}")
    print(
        f"ratio {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}); "
        "asked: at most 1.20"
    )
    if options.json:
        found = {
            "machine": describe_machine(),
            "layers": options.layers,
            "rounds": options.rounds,
            "plain_seconds": round(plain, 2),
            "fused_seconds": round(ours, 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
