"""The commands that run a bundle: `verify`, `run`, `bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

import rotary_export
from rotary_export.bundle.atomic import check_file
from rotary_export.cli.options import (
    PathType,
    allow_code_option,
    bundle_argument,
    force_option,
    json_option,
    revision_option,
)
from rotary_export.cli.report import print_report
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
@click.option(
    "--shape",
    "shapes",
    type=(click.IntRange(1), click.IntRange(1)),
    multiple=True,
    metavar="BATCH_SIZE SEQ_LEN",
    help="May be repeated; default: decode and prefill shapes.",
)
@click.option("--seconds", type=click.FloatRange(0), default=SECONDS, show_default=True)
@allow_code_option
@json_option
def bench(
    bundle: Path,
    shapes: tuple[tuple[int, int], ...],
    seconds: float,
    allow_code: bool,
    as_json: bool,
) -> None:
    """Time the main graph of BUNDLE on the CPU, in every installed runtime.

    BUNDLE may be a plain .onnx file: its inputs are drawn by their names and shapes.

    Each shape is measured for about --seconds.
    """
    from rotary_export.measure.benchmark import SHAPES, bench_bundle, bench_graph

    terminal = Terminal(as_json)
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
