"""The commands that export, and how they and `verify` print the proof."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

import rotary_export
from rotary_export.bundle.manifest import DEFAULT_FORMATS, SUFFIXES
from rotary_export.cli.terminal import Terminal
from rotary_export.errors import RotaryExportError
from rotary_export.op import spec

if TYPE_CHECKING:
    import torch

    from rotary_export.models.source import Source

DTYPES = tuple(dict.fromkeys(x_type for x_type, _ in spec.TYPE_PAIRS))

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")


@click.command()
@click.option("--dim", type=int, help="Channels of a head that are rotated; even.")
@click.option(
    "--hf-config",
    type=click.Path(path_type=Path),
    help="A Hugging Face config.json (or its folder), in place of --dim: any rope type.",
)
@click.option("--layer-type", help="Of --hf-config, where its layers have several ropes.")
@click.option("--use-xpos", is_flag=True, help="With xPos's scale.")
@click.option("--scale-base", type=float, default=512.0, show_default=True, help="Of xPos.")
@click.option("--interpolation-factor", type=float, default=1.0, show_default=True)
@click.option("--base", type=float, default=10000.0, show_default=True)
@click.option("--base-rescale-factor", type=float, default=1.0, show_default=True)
@click.option("--max-seq-len", type=int, help="Rows of the tables; default: as --hf-config says.")
@click.option("--num-heads", type=int, help="Heads of query; default: a dynamic axis.")
@click.option("--num-kv-heads", type=int, help="Heads of key; default: as --num-heads.")
@click.option("--head-dim", type=int, help="Channels of a head; default: as --dim.")
@click.option(
    "--interleaved/--half",
    default=None,
    help="Pairs (2i, 2i+1) or (i, i+dim/2); default: half, or that of the config's family.",
)
@click.option("--static", is_flag=True, help="Static shapes; seq_len is an input.")
@click.option("--batch-size", type=int, help="Of a --static export.")
@click.option(
    "--format",
    "formats",
    type=click.Choice(list(SUFFIXES)),
    multiple=True,
    default=DEFAULT_FORMATS,
    show_default=True,
    help="May be repeated.",
)
@click.option("--opset", type=int, default=23, show_default=True, help="Of ai.onnx, 18 to 25.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@json_option
def export(out: Path, as_json: bool, dtype: str, **options: Any) -> None:
    """Export a rotary embedding as a bundle and prove it equal to eager PyTorch."""
    terminal = Terminal(as_json)
    with terminal.progress() as progress:
        progress("import torch")
        import torch

        rope = _make_rope(options)
        bundle = rotary_export.export(
            rope, out, dtype=getattr(torch, dtype), progress=progress, **options
        )
    print_report(terminal, bundle.report.to_dict())
    terminal.line(f"{out}: {', '.join(bundle.manifest.files)}")
    terminal.finish({"bundle": str(out), "parity": bundle.report.to_dict()})


_EMBEDDING = ("use_xpos", "scale_base", "interpolation_factor", "base", "base_rescale_factor")


def _make_rope(options: dict[str, Any]) -> Any:
    """Make what is exported; takes its own options out, and fills in what the config says."""
    dim, path = options.pop("dim"), options.pop("hf_config")
    layer_type = options.pop("layer_type")
    embedding = {name: options.pop(name) for name in _EMBEDDING}
    if (dim is None) == (path is None):
        raise RotaryExportError("export needs one of --dim and --hf-config")
    if path is None:
        if layer_type is not None:
            raise RotaryExportError(f"--layer-type is for --hf-config, got {layer_type!r}")
        if options["max_seq_len"] is None:
            raise RotaryExportError("export needs --max-seq-len with --dim")
        options["interleaved"] = bool(options["interleaved"])
        return rotary_export.RotaryEmbedding(dim, **embedding)
    given = click.get_current_context().get_parameter_source
    for name in _EMBEDDING:
        if given(name) is ParameterSource.COMMANDLINE:
            flag = "--" + name.replace("_", "-")
            raise RotaryExportError(f"{flag} is for --dim; with --hf-config the config says it")
    from rotary_export.rope import ScaledRotaryEmbedding
    from rotary_export.rope.config import read_attention

    try:
        parameters, found = read_attention(path, layer_type)
    except RotaryExportError as error:
        named = str(path) in str(error)
        raise RotaryExportError(str(error) if named else f"{path}: {error}") from None
    for name, value in found.items():
        options[name] = value if options[name] is None else options[name]
    if options["interleaved"] is None:
        raise RotaryExportError(
            f"{path}: the layout of its model_type is not known: say --interleaved or --half"
        )
    return ScaledRotaryEmbedding(parameters)


@click.command("export-model")
@click.argument("source")
@click.option(
    "--format",
    "formats",
    type=click.Choice(list(SUFFIXES)),
    multiple=True,
    default=DEFAULT_FORMATS,
    show_default=True,
    help="May be repeated.",
)
@click.option("--opset", type=int, default=23, show_default=True, help="Of ai.onnx, 18 to 25.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: as the model is.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--dry-run", is_flag=True, help="List the rotary calls; export nothing.")
@json_option
def export_model(
    source: str, out: Path | None, dtype: str | None, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Export a whole model, its rotary embeddings fused, and prove it equal to eager PyTorch.

    SOURCE is package.module:factory, a function that returns a model, or a model and a dict of
    example inputs (its code is run); the folder of a Hugging Face model (safetensors only, no code
    of its own); or a config.json (random weights, for trying).

    With --dry-run, the exit code is 0 if at least one rotary call would be fused, else 1.
    """
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out', or '--dry-run'.")
    terminal = Terminal(as_json)
    if out is None or dry_run:
        _list_rotary_calls(terminal, source, dtype)
        return
    with terminal.progress() as progress:
        loaded, torch_dtype = _load_model(source, dtype, progress)
        bundle = rotary_export.export_model(
            loaded.model,
            loaded.example_inputs,
            out,
            dtype=torch_dtype,
            progress=progress,
            **options,
        )
    rotary = bundle.manifest.config["rotary"]
    _print_findings(terminal, loaded.note, rotary)
    print_report(terminal, bundle.report.to_dict())
    terminal.line(f"{out}: {', '.join(bundle.manifest.files)}")
    terminal.finish(
        {
            "bundle": str(out),
            "note": loaded.note,
            "rotary": rotary,
            "parity": bundle.report.to_dict(),
        }
    )


def _print_findings(terminal: Terminal, note: str, rotary: Sequence[dict[str, Any]]) -> None:
    """Print which rotary calls are fused, and why the others are not."""
    if note:
        terminal.line(f"note: {note}")
    terminal.table(
        ("function", "calls", "fused", "rotation", "not replaced because"),
        [list(row.values()) for row in rotary],
    )


def _load_model(
    source: str, dtype: str | None, progress: Callable[[str], None]
) -> tuple[Source, torch.dtype | None]:
    progress("import torch")
    import torch

    from rotary_export.models.source import load_source

    progress(f"load {source}")
    return load_source(source), None if dtype is None else getattr(torch, dtype)


def _list_rotary_calls(terminal: Terminal, source: str, dtype: str | None) -> None:
    """Print what an export would fuse; exit with 1 if that is nothing."""
    with terminal.progress() as progress:
        loaded, torch_dtype = _load_model(source, dtype, progress)
        from rotary_export.models.analyze import find_rotary_calls

        progress("find rotary embeddings")
        found = find_rotary_calls(loaded.model, loaded.example_inputs, torch_dtype)
    rotary = [asdict(finding) for finding in found.findings]
    _print_findings(terminal, loaded.note, rotary)
    name = type(loaded.model).__name__
    terminal.line(f"{name}: {found.fused} of {found.calls} rotary calls would be fused")
    terminal.finish(
        {
            "model": name,
            "note": loaded.note,
            "rotary": rotary,
            "calls": found.calls,
            "fused": found.fused,
        }
    )
    if not found.fused:
        sys.exit(1)


def print_report(terminal: Terminal, report: dict[str, Any]) -> None:
    """Print the proof as a table."""
    headers = (
        "graph", "output", "runtime", "kernel", "max abs", "ulp", "allowed", "exact",
        "ulp to float64", "ok",
    )  # fmt: skip
    rows = []
    for row in report["rows"]:
        eager, oracle = row["eager"], row["oracle"]
        rows.append(
            (
                row["graph"],
                row["output"],
                row["runtime"],
                row["kernel_path"],
                f"{float(eager['max_abs']):.3g}",
                f"{float(eager['max_ulp']):.3g}",
                f"{row['eager_allowed']:g}",
                "exact" if eager["exact"] else "-",
                "-" if row["oracle_allowed"] is None else f"{float(oracle['max_ulp']):.2f}",
                "ok" if row["passed"] else "FAILED",
            )
        )
    terminal.table(headers, rows)
    for graph, shapes in report["shapes"].items():
        terminal.line(f"{graph} was compared at {', '.join(shapes)}")
    for runtime, why in report["skipped"].items():
        terminal.line(f"not run: {runtime}: {why}")
    for what, why in report["unverified"].items():
        terminal.line(f"not tried: {what}: {why}")
    failed = sum(not row["passed"] for row in report["rows"])
    has_oracle = any(row["oracle_allowed"] is not None for row in report["rows"])
    oracle = " and the oracle" if has_oracle else ""
    terminal.line(
        f"FAILED: {failed} of {len(rows)} comparisons are out of tolerance"
        if failed
        else f"proven: {len(rows)} comparisons with eager PyTorch{oracle}, all within tolerance"
    )
