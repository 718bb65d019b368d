"""The commands that run a bundle: `verify`, `run`, `generate`, `bench`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

import rotary_export
from rotary_export.bundle.atomic import check_file
from rotary_export.cli.options import (
    IntegerList,
    PathType,
    allow_code_option,
    bundle_argument,
    force_option,
    json_option,
    revision_option,
)
from rotary_export.cli.report import print_report, print_tokens
from rotary_export.cli.terminal import Terminal
from rotary_export.measure.timing import SECONDS
from rotary_export.runtime.onnx_file import GRAPH, is_onnx_file, load_onnx_file


@click.command()
@bundle_argument
@click.option(
    "--model",
    "source",
    metavar="SOURCE",
    help="Compare a model's bundle with its model, as export-model names it.",
)
@revision_option
@click.option("--case", help="With --model: compare this one case.")
@click.option("--seed", type=click.IntRange(0), help="With --model: draw other inputs.")
@click.option("--quick", is_flag=True, help="With --model: no far positions, no long sequences.")
@allow_code_option
@json_option
def verify(
    bundle: Path,
    source: str | None,
    revision: str | None,
    case: str | None,
    seed: int | None,
    quick: bool,
    allow_code: bool,
    as_json: bool,
) -> None:
    """Compare every graph of BUNDLE, in every runtime, with eager PyTorch and a float64 oracle.

    The formats of a model's bundle are compared with each other, or with --model with the model.
    """
    needing_model = {"--case": case, "--seed": seed, "--quick": quick or None}
    for name, value in (needing_model | {"--revision": revision}).items():
        if value is not None and source is None:
            raise click.UsageError(f"{name} needs --model.")
    terminal = Terminal(as_json)
    with terminal.progress() as progress:
        progress("import torch")
        import torch  # noqa: F401

        if source is None:
            report = rotary_export.verify(bundle, progress, allow_code=allow_code)
        else:
            from rotary_export.models.source import load_source

            progress(f"load {source}")
            loaded = load_source(source, revision)
            report = rotary_export.verify_model(
                bundle,
                loaded.model,
                loaded.example_inputs,
                case=case,
                seed=seed,
                quick=quick,
                allow_code=allow_code,
                progress=progress,
            )
    print_report(terminal, report.to_dict())
    terminal.finish(report.to_dict())
    if not report.passed:
        sys.exit(1)


@click.command()
@bundle_argument
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    help="NAME=FILE.npy, NAME=INTEGER, or FILE.npz; may be repeated.",
)
@click.option("--out", type=PathType(), required=True, help="The .npz to write.")
@click.option("--graph", help="Default: rotate or model, whichever the bundle has.")
@click.option("--runtime", default="onnxruntime", show_default=True)
@click.option("--provider", "providers", multiple=True, help="Of ONNX Runtime; may be repeated.")
@click.option("--no-op-library", is_flag=True, help="Run the function body.")
@click.option("--require-fused", is_flag=True, help="Fail if the fused kernel can't run.")
@allow_code_option
@force_option("an existing --out")
@json_option
def run(
    bundle: Path,
    inputs: tuple[str, ...],
    out: Path,
    graph: str | None,
    runtime: str,
    providers: tuple[str, ...],
    no_op_library: bool,
    require_fused: bool,
    allow_code: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Run one graph of BUNDLE, or a plain .onnx file, on arrays from .npy or .npz files."""
    from rotary_export.cli.arrays import read_inputs, write_outputs

    if is_onnx_file(bundle) and (runtime != "onnxruntime" or graph not in (None, GRAPH)):
        raise click.UsageError("An .onnx file has no other --runtime and no other --graph.")
    terminal = Terminal(as_json)
    check_file(out, force)
    arrays = read_inputs(inputs)
    with terminal.progress() as progress:
        progress(f"run {graph or bundle.name}")
        wanted = list(providers) or "auto", False if no_op_library else "auto", require_fused
        if is_onnx_file(bundle):
            session = load_onnx_file(bundle, *wanted)
        else:
            session = rotary_export.load(bundle, graph, runtime, *wanted, allow_code=allow_code)
        outputs = session(**arrays)
    write_outputs(out, outputs)
    name = session.graph_name
    terminal.line(f"{name} ran on {', '.join(session.providers)}: {session.kernel_path}")
    shapes = {name: list(value.shape) for name, value in outputs.items()}
    terminal.table(
        ("output", "dtype", "shape"), [(n, v.dtype, v.shape) for n, v in outputs.items()]
    )
    terminal.line(f"wrote {out}")
    terminal.finish(
        {
            "out": str(out),
            "graph": session.graph_name,
            "providers": session.providers,
            "kernel_path": session.kernel_path,
            "shapes": shapes,
        }
    )


@click.command()
@bundle_argument
@click.option("--prompt", "prompts", multiple=True, help="A text; may be repeated, for a batch.")
@click.option("--ids", multiple=True, type=IntegerList(), help="Token ids: 1,2,3; may be repeated.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--chat", is_flag=True, help="--prompt is a user's message: apply the chat template.")
@click.option("--sample", is_flag=True, help="Draw tokens; without it, the best one is chosen.")
@click.option("--temperature", type=float, help="Of --sample, like the next three.")
@click.option("--top-k", type=int, help="Draw from the k best tokens; 0: from all.")
@click.option("--top-p", type=float, help="Draw from the best ones of this total probability.")
@click.option("--seed", type=int, help="The same seed draws the same tokens.")
@click.option("--provider", "providers", multiple=True, help="Of ONNX Runtime; may be repeated.")
@click.option("--no-op-library", is_flag=True, help="Run the function body.")
@json_option
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    ids: tuple[list[int], ...],
    chat: bool,
    sample: bool,
    providers: tuple[str, ...],
    no_op_library: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate tokens with BUNDLE, a causal language model with a key/value cache.

    Text is printed as it is generated. What is not given is read from the bundle's
    generation_config.json.
    """
    from rotary_export.runtime.decoder.text import Text, find_text

    if bool(prompts) == bool(ids):
        raise click.UsageError("Give --prompt or --ids.")
    if chat and ids:
        raise click.UsageError("--chat is for --prompt.")
    drawn = {name: options[name] for name in ("temperature", "top_k", "top_p", "seed")}
    for name, value in drawn.items():
        if value is not None and not sample:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --sample.")
    terminal = Terminal(as_json)
    with terminal.progress() as progress:
        progress(f"load {bundle.name}")
        text = Text(bundle) if prompts else find_text(bundle)
        if text and prompts:
            ids = tuple(text.encode_chat(p) if chat else text.encode(p) for p in prompts)
        decoder = rotary_export.load_decoder(
            bundle,
            providers=list(providers) or "auto",
            use_op_library=False if no_op_library else "auto",
        )
    started = time.perf_counter()
    columns = decoder.stream(ids, do_sample=sample, **options)
    rows, texts = print_tokens(terminal, columns, ids, decoder.eos_token_ids, text)
    seconds = time.perf_counter() - started
    new = sum(map(len, rows)) - sum(map(len, ids))
    speed = float(f"{new / seconds:.4g}")
    terminal.line(f"{new} tokens in {seconds:.2f} s with the prompt: {speed:g} tokens/s")
    terminal.finish({"ids": rows, "text": texts if text else None, "tokens_per_second": speed})


@click.command()
@bundle_argument
@click.option(
    "--shape",
    "shapes",
    type=(click.IntRange(1), click.IntRange(1)),
    multiple=True,
    metavar="BATCH_SIZE SEQ_LEN",
    help="May be repeated; default: decode and prefill shapes.",
)
@click.option(
    "--past", type=IntegerList(), help="Of a decoder: 0,512 times it after 0, 512 tokens."
)
@click.option("--seconds", type=click.FloatRange(0), default=SECONDS, show_default=True)
@allow_code_option
@json_option
def bench(
    bundle: Path,
    shapes: tuple[tuple[int, int], ...],
    past: list[int] | None,
    seconds: float,
    allow_code: bool,
    as_json: bool,
) -> None:
    """Time the main graph of BUNDLE on the CPU, in every installed runtime.

    BUNDLE may be a plain .onnx file: its inputs are drawn by their names and shapes.

    With --past, times how a decoder reads a prompt of so many tokens and generates the next ones.

    Each shape is measured for about --seconds.
    """
    from rotary_export.measure.benchmark import SHAPES, bench_bundle, bench_graph

    terminal = Terminal(as_json)
    if past is not None:
        if shapes:
            raise click.UsageError("Give --shape or --past.")
        _bench_decoder(terminal, bundle, past, seconds)
        return
    with terminal.progress() as progress:
        if is_onnx_file(bundle):
            from rotary_export.models.fused.describe import describe_file

            manifest = describe_file(bundle)
            found = bench_graph(bundle.parent, manifest, shapes or SHAPES, seconds, progress)
        else:
            found = bench_bundle(bundle, shapes or SHAPES, seconds, progress, allow_code=allow_code)
    report = found.to_dict()
    terminal.table(*found.tabulate())
    terminal.line("a call of session(...), allocation of its outputs included")
    for run_name, why in report["skipped"].items():
        terminal.line(f"not run: {run_name}: {why}")
    if report["warning"]:
        terminal.line(f"warning: {report['warning']}")
    terminal.finish(report)


def _bench_decoder(terminal: Terminal, bundle: Path, past: list[int], seconds: float) -> None:
    from rotary_export.measure.decoding import bench_decoder

    with terminal.progress() as progress:
        found = bench_decoder(bundle, past, seconds, progress)
    terminal.table(*found.tabulate())
    terminal.line("batch_size 1; prefill: of the prompt; decode: of one token after it")
    for run_name, why in found.skipped.items():
        terminal.line(f"not run: {run_name}: {why}")
    terminal.finish(found.to_dict())
