"""The commands that write a bundle: `export` and `export-model`."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

import rotary_export
from rotary_export.bundle.folder import check_out, find_out
from rotary_export.cli.options import PathType, bundle_options, decoder_options, revision_option
from rotary_export.cli.report import print_report
from rotary_export.cli.terminal import Terminal
from rotary_export.errors import CheckFailedError, RotaryExportError, UsageWarning

if TYPE_CHECKING:
    import torch

    from rotary_export.models.source import Source


@click.command()
@click.option("--dim", type=int, help="Number of rotated channels of a head; even.")
@click.option(
    "--hf-config",
    type=PathType(),
    help="A Hugging Face config.json (or its folder), in place of --dim: any rope type.",
)
@click.option("--layer-type", help="Of --hf-config, where its layers have several ropes.")
@click.option("--use-xpos", is_flag=True, help="With xPos's scale.")
@click.option("--scale-base", type=float, default=512.0, show_default=True, help="Of xPos.")
@click.option("--interpolation-factor", type=float, default=1.0, show_default=True)
@click.option("--base", type=float, default=10000.0, show_default=True)
@click.option("--base-rescale-factor", type=float, default=1.0, show_default=True)
@click.option("--max-seq-len", type=int, help="Rows of the tables; default: those of --hf-config.")
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
@bundle_options(dtype="float32")
def export(out: Path, as_json: bool, dtype: str, **options: Any) -> None:
    """Export a rotary embedding as a bundle and prove it equal to eager PyTorch."""
    terminal = Terminal(as_json)
    _check_target(options["opset"], options["force"], out)
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


def _check_target(opset: int, force: bool, *folders: Path | None) -> None:
    """Check the opset and the folders to write before torch is imported or a model is loaded."""
    from rotary_export.op.onnx_signature import check_opset

    check_opset(opset)
    for folder in folders:
        if folder is not None:
            check_out(find_out(folder), force)


_EMBEDDING = ("use_xpos", "scale_base", "interpolation_factor", "base", "base_rescale_factor")


def _make_rope(options: dict[str, Any]) -> Any:
    """Make the module to export; removes its own options, and adds those of the config."""
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
            raise RotaryExportError(f"{flag} is for --dim; with --hf-config the config contains it")
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
            f"{path}: the layout of its model_type is not known: pass --interleaved or --half"
        )
    return ScaledRotaryEmbedding(parameters)


@click.command("export-model")
@click.argument("source")
@revision_option
@bundle_options(dtype=None, requires_out=False)
@click.option("--dry-run", is_flag=True, help="List the rotary calls; export nothing.")
@click.option(
    "--float32-tables",
    is_flag=True,
    help="Compute angles and tables in float32 where the model computes them in a half type.",
)
@decoder_options
@click.option("--quick", is_flag=True, help="Prove less: no far positions, no long sequences.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the proof's inputs."
)
@click.option("--case", help="Compare this one case of the proof; write nothing.")
@click.option(
    "--keep-failed",
    type=PathType(),
    help="Folder to write the bundle to if its proof fails.",
)
def export_model(
    source: str,
    revision: str | None,
    out: Path | None,
    dtype: str | None,
    dry_run: bool,
    case: str | None,
    keep_failed: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Export a whole model, its rotary embeddings fused, and prove it equal to eager PyTorch.

    SOURCE is package.module:factory, a function that returns a model, or a model and a dict of
    example inputs (its code is run); the folder of a Hugging Face model (safetensors only, no code
    of its own), or its name on the hub, org/name; or a config.json (random weights, for trying).

    With --dry-run, the exit code is 0 if at least one rotary call would be fused, else 1. With
    --case, it is 0 if that case is within its tolerances, else 1.
    """
    if out is None and not dry_run and case is None:
        raise click.UsageError("Missing option '--out', '--dry-run' or '--case'.")
    terminal = Terminal(as_json)
    folders = () if dry_run or case is not None else (out, keep_failed)
    _check_target(options["opset"], options["force"], *folders)
    if dry_run:
        _list_rotary_calls(terminal, source, revision, dtype, options)
        return
    if out is None or case is not None:
        _prove_case(terminal, source, revision, dtype, case or "", options)
        return
    with terminal.progress() as progress:
        loaded, torch_dtype = _load_model(source, revision, dtype, progress)
        options["model_folder"] = loaded.folder
        if options["prompts"] is not None:
            options["prompts"] = _read_lines(options["prompts"])
        from rotary_export.models.prove.prove import RejectedError

        warnings.simplefilter("ignore", UsageWarning)  # printed as a note
        try:
            bundle = rotary_export.export_model(
                loaded.model,
                loaded.example_inputs,
                out,
                dtype=torch_dtype,
                keep_failed=keep_failed,
                progress=progress,
                **options,
            )
        except RejectedError as error:
            again = f"; to repeat it: {_write_command(error.case)}" if error.case else ""
            raise CheckFailedError(f"{error}{again}") from error
    manifest = bundle.manifest
    parts = [manifest.select(name).config for name in manifest.graphs]
    rotary = [finding for part in parts for finding in part["rotary"]]
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


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a text that are not empty."""
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RotaryExportError(f"{path} can't be read: {error}") from None
    if not lines:
        raise RotaryExportError(f"{path} must contain at least one prompt, got none")
    return lines


def _write_command(case: str) -> str:
    """Return the command that repeats one case of this export, and writes nothing."""
    context = click.get_current_context()
    words = ["rotary-export", "export-model", context.params["source"]]
    left_out = ("source", "out", "force", "keep_failed", "case", "seed", "as_json")
    for parameter in context.command.params:
        name, value = parameter.name or "", context.params.get(parameter.name or "")
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not given or name in left_out:
            continue
        for each in value if isinstance(value, tuple) else (value,):
            words += [parameter.opts[0]] if each is True else [parameter.opts[0], str(each)]
    words += ["--case", case, "--seed", str(context.params["seed"])]
    return shlex.join(words)


def _prove_case(
    terminal: Terminal,
    source: str,
    revision: str | None,
    dtype: str | None,
    case: str,
    options: dict[str, Any],
) -> None:
    """Print the proof of one case; exit with 1 if it fails."""
    options = {n: value for n, value in options.items() if n not in ("force", "prompts")}
    with terminal.progress() as progress:
        loaded, torch_dtype = _load_model(source, revision, dtype, progress)
        from rotary_export.models.export_model import prove_case

        report = prove_case(
            loaded.model,
            loaded.example_inputs,
            case,
            dtype=torch_dtype,
            progress=progress,
            **options,
        )
    print_report(terminal, report.to_dict())
    terminal.finish(report.to_dict())


def _print_findings(terminal: Terminal, note: str, rotary: Sequence[dict[str, Any]]) -> None:
    """Print which rotary calls are fused, and why the others are not."""
    if note:
        terminal.line(f"note: {note}")
    terminal.table(
        ("function", "calls", "fused", "rotation", "not replaced because"),
        [list(row.values()) for row in rotary],
    )


def _load_model(
    source: str, revision: str | None, dtype: str | None, progress: Callable[[str], None]
) -> tuple[Source, torch.dtype | None]:
    progress("import torch")
    import torch

    from rotary_export.models.source import load_source

    progress(f"load {source}")
    return load_source(source, revision), None if dtype is None else getattr(torch, dtype)


def _list_rotary_calls(
    terminal: Terminal,
    source: str,
    revision: str | None,
    dtype: str | None,
    options: Mapping[str, Any],
) -> None:
    """Print what an export would fuse; exit with 1 if that is nothing."""
    with terminal.progress() as progress:
        loaded, torch_dtype = _load_model(source, revision, dtype, progress)
        from rotary_export.models.analyze import find_rotary_calls
        from rotary_export.models.decoder.options import DecoderOptions

        progress("find rotary embeddings")
        decoder = DecoderOptions(
            options["cache"],
            options["last_logits"],
            options["max_cache_len"],
            options["inputs_embeds"],
        )
        found = find_rotary_calls(loaded.model, loaded.example_inputs, torch_dtype, decoder)
    rotary = [asdict(finding) for finding in found.findings]
    _print_findings(terminal, loaded.note, rotary)
    name = type(loaded.model).__name__
    inline = "" if found.fused else "; an export looks for inline ones in its ONNX graph"
    terminal.line(f"{name}: {found.fused} of {found.calls} rotary calls would be fused{inline}")
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
