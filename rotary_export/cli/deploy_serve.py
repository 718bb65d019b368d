"""The commands that run a bundle elsewhere: `deploy` and `serve`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from rotary_export.bundle.json_file import read_json
from rotary_export.cli.options import (
    Decorator,
    allow_code_option,
    bundle_argument,
    force_option,
    json_option,
    out_option,
)
from rotary_export.cli.terminal import Terminal, print_line
from rotary_export.deploy.targets import TARGETS
from rotary_export.serving.core import MAX_BATCH_SIZE, PLATFORMS
from rotary_export.serving.options import ENGINES, Options
from rotary_export.serving.size_limits import MAX_REQUEST_MIB


def _count_option(name: str, default: int, text: str) -> Decorator:
    """Return an option of at least 1."""
    kind = click.IntRange(1)
    return click.option(name, type=kind, default=default, show_default=True, help=text)


def _port_option(name: str, default: int) -> Decorator:
    kind = click.IntRange(0, 65535)
    return click.option(name, type=kind, default=default, show_default=True, help="0: a free one.")


def _complete_target(_: object, __: object, text: str) -> list[str]:
    return [name for name in TARGETS if name.startswith(text)]


@click.command()
@click.argument("target", shell_complete=_complete_target)
@bundle_argument
@out_option()
@force_option("a folder that deploy wrote")
@allow_code_option
@json_option
def deploy(
    target: str, bundle: Path, out: Path, force: bool, allow_code: bool, as_json: bool
) -> None:
    """Write the folder that runs BUNDLE on TARGET: sources, the bundle, an example, a README.

    TARGET is one of those below.
    """
    from rotary_export.deploy.deploy import FILE_NAME
    from rotary_export.deploy.deploy import deploy as write_kit

    terminal = Terminal(as_json)
    with terminal.progress() as progress:
        path = write_kit(target, bundle, out, force=force, allow_code=allow_code, progress=progress)
    files = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())
    terminal.line(f"{out}: {', '.join(name for name in files if '/' not in name)}")
    terminal.line(f"read {out / 'README.md'}")
    terminal.finish({"out": str(out), "files": files, **read_json(path / FILE_NAME)})


deploy.epilog = "\b\nTargets:\n" + "\n".join(
    f"  {name}: {target.what}" for name, target in TARGETS.items()
)


@click.command()
@bundle_argument
@click.option("--engine", type=click.Choice(list(ENGINES)), default="mlserver", show_default=True)
@_count_option("--replicas", 1, "Processes that run the model; for --engine ray.")
@click.option("--name", help="Of the model; default: the bundle's.")
@click.option("--graph", help="Default: rotate or model, whichever the bundle has.")
@click.option("--runtime", type=click.Choice(list(PLATFORMS)), default="onnxruntime")
@allow_code_option
@_count_option(
    "--max-batch-size", MAX_BATCH_SIZE, "Largest number of rows of a run; 1: each request alone."
)
@click.option(
    "--max-batch-delay-ms",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Longest time that a request waits to be batched; 0: only during another run.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@_port_option("--http-port", 8080)
@_port_option("--grpc-port", 8081)
@_port_option("--metrics-port", 8082)
@click.option(
    "--max-request-mib",
    type=click.IntRange(1, 2047),
    help=f"Largest body; default: of the bundle's largest request, at most {MAX_REQUEST_MIB}.",
)
def serve(engine: str, replicas: int, **options: Any) -> None:
    """Serve BUNDLE over HTTP and gRPC (Open Inference Protocol) until SIGTERM or Ctrl-C.

    Requests are checked one by one, then run together; an invalid one fails alone. In-flight
    requests are completed on SIGTERM.
    """
    if replicas > 1 and engine != "ray":
        raise click.UsageError(f"--replicas must be 1 for the engine {engine}, got {replicas}")
    import_module(ENGINES[engine]).serve(Options(**options, replicas=replicas), print_line)
