"""Which rotary embeddings are fused: every family of the installed transformers that has one.

Each family gets a tiny random model. B: torch.onnx.export as anyone calls it (dynamo, opset 23,
dynamic batch and sequence), then `rotary_export.fuse`; the fused file is run at shapes that were
not traced and held against eager PyTorch. A: `rotary_export.export_model`.

    python tools/coverage/coverage.py --json tools/results/coverage.json
    python tools/coverage/coverage.py --only llama,gptj,phi3+longrope

Each family runs in a process of its own: a crash or a hang is a line of the table.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from coverage_configs import VARIANTS, make_tiny_config
from coverage_report import describe_summary, summarize, write_json
from runs import CLOSE, describe_error, measure_error, open_session, run_guarded
from torch import nn

import rotary_export
from rotary_export.compat.quiet import quiet_torch
from rotary_export.errors import CheckFailedError

OPSET = 23
TRACED = (2, 6)
UNTRACED = ((3, 11), (1, 1), (2, 40))
_APPLY = re.compile(r"^(apply|_apply|rotate|forward)_.*(rotary|rope)|^apply_rotary")


# ---- families


def discover() -> list[str]:
    """List the model types whose code mentions a rotary embedding and that read input_ids."""
    found = []
    for model_type in sorted(transformers.CONFIG_MAPPING.keys()):
        try:
            model_class = find_class(transformers.CONFIG_MAPPING[model_type])
            source = inspect.getsource(sys.modules[model_class.__module__])
        except (ImportError, KeyError, AttributeError, OSError, TypeError, ValueError):
            continue
        if re.search("rotary|apply_rope", source, re.IGNORECASE) and is_text(model_class):
            found.append(model_type)
    return found + list(VARIANTS)


def find_class(config_class: type) -> type[nn.Module]:
    """Return the class with a language model's head, else the bare model's."""
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if config_class in mapping:
            found = mapping[config_class]
            return found[0] if isinstance(found, tuple) else found
    raise KeyError(config_class)


def is_text(model_class: type[nn.Module]) -> bool:
    """Whether a model runs on input_ids alone; what has several parts is tried part by part."""
    parameters = inspect.signature(model_class.forward).parameters
    others = ("pixel_values", "input_features", "input_values", "decoder_input_ids", "audio_values")
    return "input_ids" in parameters and not any(name in parameters for name in others)


class Logits(nn.Module):
    """input_ids -> the first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in accepted else {}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, S) int64 -> (B, S, ...) float32."""
        result = self.model(input_ids=input_ids, **self.options)
        return result[0]


def build(family: str) -> tuple[Logits, Any]:
    """Make a tiny random model whose attention depends on positions.

    The usual initialisation (0.02) makes all scores near zero, so that any rotation would do.
    """
    config = make_tiny_config(family)
    torch.manual_seed(0)
    model = find_class(type(config))(config).eval().float()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # torch.onnx has no grouped_mm
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter)
    return Logits(model), config


@contextmanager
def count_calls(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the tensors that the model's own functions rotate; 0: it has none that is known."""
    count, depth = 0, 0
    replaced = []

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count, depth
            depth += 1
            try:
                result = function(*args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                tensors = result if isinstance(result, tuple) else (result,)
                count += sum(isinstance(t, torch.Tensor) for t in tensors)
            return result

        return counted

    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        if not module.__name__.startswith("transformers."):
            continue
        for name, function in list(vars(module).items()):
            if inspect.isfunction(function) and _APPLY.search(name):
                replaced.append((module, name, function))
                setattr(module, name, wrap(function))
    try:
        yield lambda: count
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


# ---- the two ways


def try_a(family: str) -> dict[str, Any]:
    """Export one family with `export_model`, which proves it at sizes that were not traced.

    Args:
        family: A model type, or one of VARIANTS.

    Returns:
        status: "fused" (all calls), "left" (some or all were), "wrong", "no rotary", "no export",
        "no model".
    """
    try:
        model, _ = build(family)
    except Exception as error:  # whatever a family's code raises
        return {"status": "no model", "reason": describe_error(error)}
    inputs = {"input_ids": make_ids(TRACED, seed=1)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            bundle = rotary_export.export_model(
                model.model, inputs, Path(folder) / "bundle", opset=OPSET, formats=("onnx",)
            )
        except CheckFailedError as error:
            reasons = {"is not equal to eager": "wrong", "applies no rotary": "no rotary"}
            status = next((s for words, s in reasons.items() if words in str(error)), "left")
            return {"status": status, "reason": describe_error(error)}
        except rotary_export.RotaryExportError as error:
            return {"status": "no export", "reason": describe_error(error)}
    found = bundle.manifest.config["rotary"]
    calls, fused = (sum(finding[key] for finding in found) for key in ("calls", "fused"))
    return {
        "status": "fused" if fused == calls else "left",
        "calls": calls,
        "fused": fused,
        "layouts": sorted({finding["rotation"] for finding in found if finding["rotation"]}),
        "reason": "; ".join(finding["reason"] for finding in found if finding["reason"]),
        "max_size": dict(bundle.manifest.graphs["model"].max_size),
        "ulp": max(row["eager"]["max_ulp"] for row in bundle.report.to_dict()["rows"]),
    }


def try_b(family: str, keep: Path | None = None) -> dict[str, Any]:
    """Export one family with torch.onnx, fuse it, and hold it against eager.

    Args:
        family: A model type, or one of VARIANTS.
        keep: Folder to keep the exported file in.

    Returns:
        status: "fused" (all calls), "left" (some or all were), "wrong", "no export", "no model".
    """
    row: dict[str, Any] = {"family": family}
    try:
        model, config = build(family)
        ids = make_ids(TRACED, seed=1)
        with count_calls(model) as calls, torch.no_grad():
            model(ids)
            row["calls"] = calls()
    except Exception as error:  # whatever a family's code raises
        return row | {"status": "no model", "reason": describe_error(error)}
    row |= {"rope_type": describe_rope(config), "model": type(model.model).__name__}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        start = time.perf_counter()
        try:
            try:
                export(model, ids, file)
            except Exception:  # torch's exporter does not know every scaled_dot_product_attention
                model.model.set_attn_implementation("eager")
                export(model, ids, file)
        except Exception as error:  # whatever torch's exporter raises
            return row | {"status": "no export", "reason": describe_error(error)}
        if keep is not None:
            shutil.copyfile(file, keep / f"{family}.onnx")
        row["export_seconds"] = round(time.perf_counter() - start, 2)
        return row | fuse_and_compare(model, file)


def fuse_and_compare(model: Logits, file: Path) -> dict[str, Any]:
    start = time.perf_counter()
    row: dict[str, Any] = {}
    try:
        result = rotary_export.fuse(file)
    except rotary_export.RotaryExportError as error:
        return {"status": "left", "fused": 0, "reason": describe_error(error)}
    row["fuse_seconds"] = round(time.perf_counter() - start, 2)
    left = [f"{found.node}: {found.reason}" for found in result.why]
    row |= {
        "fused": len(result.fused),
        "nodes": result.nodes,
        "left": len(left),
        "was": sorted(set(result.fused.values())),
        "ulp": max(c.error.max_ulp for c in result.check.comparisons),
    }
    fused = file.with_name("fused.onnx")
    result.save(fused)
    before = compare(model, file, False)
    after = [
        max(pair) for pair in zip(*(compare(model, fused, b) for b in (False, True)), strict=True)
    ]
    row["error"], row["error_before"] = max(after), max(before)
    if any(a > CLOSE and a > 2 * b for a, b in zip(after, before, strict=True)):
        return row | {"status": "wrong", "reason": f"{row['error']:.2g} off eager"}
    if np.inf in after:
        return row | {"status": "no export", "reason": "torch's file fails at untraced shapes"}
    if left:
        return row | {"status": "left", "reason": "; ".join(left)}
    return row | {"status": "fused"}


def export(model: nn.Module, ids: torch.Tensor, file: Path) -> None:
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with quiet_torch(), torch.no_grad():
        program = torch.onnx.export(
            model, (ids,), dynamo=True, opset_version=OPSET, dynamic_shapes=(dims,), verbose=False
        )
        program.save(file)


def make_ids(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(seed))


def compare(model: Logits, file: Path, library: bool) -> list[float]:
    """Return the error at each untraced shape, relative to the largest output; inf: it fails."""
    session = open_session(file, library)
    errors = []
    for seed, shape in enumerate(UNTRACED):
        ids = make_ids(shape, seed + 10)
        try:
            (got,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        except Exception:  # ORT's own exceptions share no base class
            errors.append(float("inf"))
            continue
        with torch.no_grad():
            want = model(ids).numpy()
        errors.append(measure_error(got, want))
    return errors


def describe_rope(config: Any) -> str:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = set()
    for value in (found, *found.values()):
        if isinstance(value, dict) and (value.get("rope_type") or value.get("type")):
            kinds.add(str(value.get("rope_type") or value.get("type")))
    return ", ".join(sorted(kinds)) or "own"


# ---- all of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="Families, separated by commas.")
    parser.add_argument("--json", type=Path, help="File to write.")
    parser.add_argument("--resume", action="store_true", help="Keep the lines of --json's file.")
    parser.add_argument("--keep", type=Path, help="Folder to keep the files of torch.onnx in.")
    parser.add_argument("--timeout", type=float, default=180.0, help="Seconds per family.")
    arguments = parser.parse_args()
    families = arguments.only.split(",") if arguments.only else discover()
    known = {}
    if arguments.resume and arguments.json.exists():
        known = {row["family"]: row for row in json.loads(arguments.json.read_text())["rows"]}
    rows = []
    for index, family in enumerate(families, 1):
        row = known.get(family)
        if row is None:
            b = partial(try_b, family, keep=arguments.keep)
            row = {"family": family} | run_guarded(b, arguments.timeout)
        if row.get("a", {}).get("status", "not tried") == "not tried":
            row["a"] = run_guarded(partial(try_a, family), arguments.timeout)
        rows.append(row)
        found = [
            f"{name} {way['status']} {way.get('reason', '')[:160]}"
            for name, way in (("A", row["a"]), ("B", row))
        ]
        print(f"{index}/{len(families)} {family}: {'; '.join(found)}", file=sys.stderr, flush=True)
        if arguments.json:
            write_json(arguments.json, rows)
    print(describe_summary(summarize(rows)))


if __name__ == "__main__":
    main()
