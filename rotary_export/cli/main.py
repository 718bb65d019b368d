"""`rotary-export`: export, fuse, verify, run, bench, deploy, serve, inspect, doctor.

Exit codes: 0 fine, 1 a check failed, 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import rotary_export
from rotary_export.cli.export_commands import export, export_model, json_option, print_report
from rotary_export.cli.terminal import Terminal
from rotary_export.deploy.targets import TARGETS
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.measure.timing import SECONDS
from rotary_export.package import __version__
from rotary_export.serving.core import MAX_BATCH_SIZE, PLATFORMS
from rotary_export.serving.options import ENGINES, Options

if TYPE_CHECKING:
    from rotary_export.fusion.candidates import NotReplaced

PORT = click.IntRange(0, 65535)
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir", "ml_dtypes")


class _Group(click.Group):
    """Turns the package's errors into one line and an exit code; no traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["as_json"] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader, `head` say, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except CheckFailedError as error:
            self._fail(str(error), 1)
        except RotaryExportError as error:
            self._fail(str(error), 2)
        except ModuleNotFoundError as error:
            if error.name not in EXPORT_PACKAGES:
                raise
            self._fail(f"this needs {error.name}: pip install 'rotary_export[export]'", 2)
        except OSError as error:
            self._fail(f"{error.strerror or error}: {error.filename}", 2)

    @staticmethod
    def _fail(message: str, code: int) -> None:
        if click.get_current_context().meta["as_json"]:
            print(json.dumps({"error": message}))
        click.echo(f"rotary-export: {message}", err=True)
        sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Take rotary position embeddings out of PyTorch, run them anywhere, prove them equal.

    Exit codes: 0 fine, 1 a check failed, 2 wrong usage.
    """


cli.add_command(export)
cli.add_command(export_model)


@cli.command()
@click.argument("source", metavar="IN.onnx", type=click.Path(path_type=Path))
@click.argument("out", metavar="[OUT.onnx]", type=click.Path(path_type=Path), required=False)
@click.option(
    "--why",
    is_flag=False,
    flag_value="",
    metavar="[NODE]",
    help="Name the check that refused each call, and the nearest rotation; or only those of "
    "NODE, by its name or that of an output. Put it last, or write --why=NODE.",
)
@click.option("--dry-run", is_flag=True, help="Run nothing and write nothing; no OUT.onnx needed.")
@click.option(
    "--shape",
    "shapes",
    type=(click.IntRange(1), click.IntRange(1), click.IntRange(0)),
    multiple=True,
    metavar="BATCH_SIZE SEQ_LEN PAST_LEN",
    help="What to compare at; may be repeated; default: three shapes.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@json_option
def fuse(
    source: Path,
    out: Path | None,
    why: str | None,
    dry_run: bool,
    shapes: tuple[tuple[int, int, int], ...],
    force: bool,
    as_json: bool,
) -> None:
    """Put one fused node wherever IN.onnx applies a rotary embedding, and prove it equal.

    IN.onnx may be any exporter's. It is run before and after; OUT.onnx is written if nothing
    differs. Exit code 1: nothing was fused, or the outputs differ.
    """
    from rotary_export.fusion.result import NothingFusedError, check_out, describe_why

    terminal = Terminal(as_json)
    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT.onnx'; --why [NODE] stands after the files.")
    if out is not None and not dry_run:
        check_out(out, force, [source])
    try:
        with terminal.progress() as progress:
            progress("import onnx")
            result = rotary_export.fuse(
                source, shapes=shapes or None, dry_run=dry_run,
                examine=[why] if why else [], progress=progress,
            )  # fmt: skip
    except NothingFusedError as error:
        _print_why(terminal, why, error.why)
        terminal.finish({"error": str(error), "calls_fused": 0, **describe_why(error.why)})
        click.echo(f"rotary-export: {error}", err=True)
        sys.exit(1)
    if out is not None and not dry_run:
        result.save(out, force=force)
    report = result.to_dict()
    kinds = Counter(result.fused.values())
    terminal.table(("fused", "which was"), [(count, was) for was, count in kinds.items()])
    _print_why(terminal, why, result.why)
    headers = ("batch", "length", "past", "runtime", "before", "ulp", "allowed")
    terminal.table(
        headers,
        [
            (r["batch"], r["length"], r["past"], r["runtime"], r["before"], f"{r['ulp']:.3g}",
             f"{r['allowed']:g}")
            for r in report["compared"]
        ],
    )  # fmt: skip
    for skipped in report["not_compared"]:
        terminal.line(f"not compared: {skipped}")
    done = "nothing was written, it would fuse" if dry_run else "fused"
    terminal.line(
        f"{source if dry_run else out}: {done} {len(result.fused)} rotary calls into "
        f"{result.nodes} nodes; not replaced: {report['calls_not_replaced']}"
    )
    terminal.finish({"out": None if dry_run else str(out), **report})


def _print_why(terminal: Terminal, why: str | None, refused: Sequence[NotReplaced]) -> None:
    """Print what was not replaced; with --why, the check that decided and what is nearest."""
    chosen = [each for each in refused if not why or why in (each.node, each.output)]
    if why and not chosen:
        terminal.line(f"{why}: replaced")
    for each in chosen:
        terminal.line(f"not replaced: {each.node}: {each.reason}")
        if why is not None:
            terminal.line(f"  decided by: {each.check}")
            terminal.line(f"  nearest: {each.nearest or 'no rotation is near'}")
    if chosen and why is None:
        terminal.line("--why names the check that decided")


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def verify(bundle: Path, as_json: bool) -> None:
    """Compare every graph of BUNDLE, in every runtime, with eager PyTorch and a float64 oracle."""
    terminal = Terminal(as_json)
    with terminal.progress() as progress:
        progress("import torch")
        report = rotary_export.verify(bundle, progress)
    print_report(terminal, report.to_dict())
    terminal.finish(report.to_dict())
    if not report.passed:
        sys.exit(1)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    help="NAME=FILE.npy, NAME=INTEGER, or FILE.npz; may be repeated.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .npz to write.")
@click.option("--graph", default="rotate", show_default=True)
@click.option("--runtime", default="onnxruntime", show_default=True)
@click.option("--provider", "providers", multiple=True, help="Of ONNX Runtime; may be repeated.")
@click.option("--no-op-library", is_flag=True, help="Run the function body.")
@click.option("--require-fused", is_flag=True, help="Fail where the fused kernel can't run.")
@click.option("--force", is_flag=True, help="Replace an existing --out.")
@json_option
def run(
    bundle: Path,
    inputs: tuple[str, ...],
    out: Path,
    graph: str,
    runtime: str,
    providers: tuple[str, ...],
    no_op_library: bool,
    require_fused: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Run one graph of BUNDLE on arrays from .npy or .npz files."""
    from rotary_export.cli.arrays import read_inputs, write_outputs

    terminal = Terminal(as_json)
    if out.exists() and not force:
        raise RotaryExportError(f"{out} exists; --force replaces it")
    arrays = read_inputs(inputs)
    with terminal.progress() as progress:
        progress(f"run {graph}")
        session = rotary_export.load(
            bundle,
            graph,
            runtime,
            list(providers) or "auto",
            False if no_op_library else "auto",
            require_fused,
        )
        outputs = session(**arrays)
    write_outputs(out, outputs)
    terminal.line(f"{graph} ran on {', '.join(session.providers)}: {session.kernel_path}")
    shapes = {name: list(value.shape) for name, value in outputs.items()}
    terminal.table(
        ("output", "dtype", "shape"), [(n, v.dtype, v.shape) for n, v in outputs.items()]
    )
    terminal.line(f"wrote {out}")
    terminal.finish(
        {
            "out": str(out),
            "providers": session.providers,
            "kernel_path": session.kernel_path,
            "shapes": shapes,
        }
    )


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--shape",
    "shapes",
    type=(click.IntRange(1), click.IntRange(1)),
    multiple=True,
    metavar="BATCH_SIZE SEQ_LEN",
    help="May be repeated; default: decode and prefill shapes.",
)
@click.option("--seconds", type=click.FloatRange(0), default=SECONDS, show_default=True)
@json_option
def bench(bundle: Path, shapes: tuple[tuple[int, int], ...], seconds: float, as_json: bool) -> None:
    """Time the rotate graph of BUNDLE on the CPU, in every runtime that is here.

    Each shape is measured for about --seconds.
    """
    from rotary_export.measure.benchmark import SHAPES, bench_bundle

    terminal = Terminal(as_json)
    with terminal.progress() as progress:
        found = bench_bundle(bundle, shapes or SHAPES, seconds, progress)
    report = found.to_dict()
    terminal.table(*found.tabulate())
    terminal.line("a call of session(...), allocation of its outputs included")
    for run_name, why in report["skipped"].items():
        terminal.line(f"not run: {run_name}: {why}")
    if report["warning"]:
        terminal.line(f"warning: {report['warning']}")
    terminal.finish(report)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--engine", type=click.Choice(list(ENGINES)), default="mlserver", show_default=True)
@click.option(
    "--replicas",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that run the model, of --engine ray.",
)
@click.option("--name", help="Of the model; default: the bundle's.")
@click.option("--graph", help="Default: rotate or model, whichever the bundle has.")
@click.option("--runtime", type=click.Choice(list(PLATFORMS)), default="onnxruntime")
@click.option("--allow-torchscript", is_flag=True, help="For --runtime torchscript: it is code.")
@click.option(
    "--max-batch-size",
    type=click.IntRange(1),
    default=MAX_BATCH_SIZE,
    show_default=True,
    help="Rows that run together; 1: each request by itself.",
)
@click.option(
    "--max-batch-delay-ms",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="How long a request waits for company, at most; 0: only while a run is on.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--http-port", type=PORT, default=8080, show_default=True, help="0: a free one.")
@click.option("--grpc-port", type=PORT, default=8081, show_default=True, help="0: a free one.")
@click.option("--metrics-port", type=PORT, default=8082, show_default=True, help="0: a free one.")
@click.option(
    "--max-request-mib",
    type=click.IntRange(1, 2047),
    default=64,
    show_default=True,
    help="Largest body that is read.",
)
def serve(engine: str, replicas: int, **options: Any) -> None:
    """Serve BUNDLE over HTTP and gRPC (Open Inference Protocol) until SIGTERM or Ctrl-C.

    Requests are checked one by one, then run together; one that is wrong fails alone.
    """
    if replicas > 1 and engine != "ray":
        raise click.UsageError(f"--replicas must be 1 for the engine {engine}, got {replicas}")
    import_module(ENGINES[engine]).serve(Options(**options, replicas=replicas), click.echo)


@cli.command()
@click.argument("target")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace a folder that deploy wrote.")
@json_option
def deploy(target: str, bundle: Path, out: Path, force: bool, as_json: bool) -> None:
    """Write the folder that runs BUNDLE on TARGET: sources, the bundle, an example, a page to read.

    TARGET is one of those below.
    """
    from rotary_export.deploy.deploy import FILE_NAME
    from rotary_export.deploy.deploy import deploy as write_kit

    terminal = Terminal(as_json)
    with terminal.progress() as progress:
        path = write_kit(target, bundle, out, force=force, progress=progress)
    files = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())
    terminal.line(f"{out}: {', '.join(name for name in files if '/' not in name)}")
    terminal.line(f"read {out / 'README.md'}")
    terminal.finish({"out": str(out), "files": files, **json.loads((path / FILE_NAME).read_text())})


deploy.epilog = "\b\n" + "\n".join(f"{name}: {target.what}" for name, target in TARGETS.items())


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Say what is in PATH, a bundle or an .onnx file."""
    from rotary_export.cli.inspection import inspect_path

    terminal = Terminal(as_json)
    found = inspect_path(path)
    for name, value in found.items():
        if not isinstance(value, list):
            terminal.line(f"{name}: {value}")
    for name, value in found.items():
        if isinstance(value, list) and value:
            terminal.line(f"\n{name}")
            terminal.table(list(value[0]), [list(row.values()) for row in value])
    terminal.finish(found)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can run, and why CUDA or the op library are or are not there."""
    from rotary_export.cli.inspection import examine_machine

    terminal = Terminal(as_json)
    facts, problems = examine_machine()
    terminal.table(("what", "found"), list(facts.items()))
    for problem in problems:
        terminal.line(f"problem: {problem}")
    terminal.finish({"facts": facts, "problems": problems})
    if problems:
        sys.exit(1)
