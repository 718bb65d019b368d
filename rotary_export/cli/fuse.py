"""The command `fuse`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

import rotary_export
from rotary_export.cli.options import PathType, force_option, json_option
from rotary_export.cli.terminal import Terminal, print_error

if TYPE_CHECKING:
    from rotary_export.fusion.candidates import NotReplaced


@click.command()
@click.argument("source", metavar="IN.onnx", type=PathType())
@click.argument("out", metavar="[OUT.onnx]", type=PathType(), required=False)
@click.option(
    "--why",
    is_flag=False,
    flag_value="",
    metavar="[NODE]",
    help="Name the check that refused each call, and the nearest rotation; or only those of "
    "NODE, by its name or that of an output. Put it last, or write --why=NODE.",
)
@click.option(
    "--float32-tables",
    is_flag=True,
    help="Compute angles and tables in float32 where the model computes them in a half type.",
)
@click.option(
    "--operators",
    type=click.Choice(["onnx"]),
    help="Also write attention and norms in ai.onnx's own operators, of opset 23; without it, only "
    "rotary embeddings are replaced.",
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
@click.option(
    "--bundle",
    type=PathType(),
    help="Folder to write a bundle to, which verify, bench, run, deploy and serve open.",
)
@force_option("an existing file or bundle")
@json_option
def fuse(
    source: Path,
    out: Path | None,
    why: str | None,
    float32_tables: bool,
    operators: str | None,
    dry_run: bool,
    shapes: tuple[tuple[int, int, int], ...],
    bundle: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Put one fused node wherever IN.onnx applies a rotary embedding, and prove it equal.

    IN.onnx may be any exporter's. It is run before and after; OUT.onnx is written if nothing
    differs. Exit code 1: nothing was fused, or the outputs differ.
    """
    from rotary_export.fusion.result import NothingFusedError, check_out, describe_why

    terminal = Terminal(as_json)
    if out is None and bundle is None and not dry_run:
        raise click.UsageError(
            "Missing argument 'OUT.onnx' or --bundle DIR; --why [NODE] stands after the files."
        )
    if out is not None and not dry_run:
        check_out(out, force, [source])
    if bundle is not None and not dry_run:
        from rotary_export.models.fused.bundle import check_bundle_out, write_fused_bundle

        check_bundle_out(bundle, force, source)
    try:
        with terminal.progress() as progress:
            progress("import onnx")
            result = rotary_export.fuse(
                source, shapes=shapes or None, float32_tables=float32_tables, operators=operators,
                dry_run=dry_run, examine=[why] if why else [], progress=progress,
            )  # fmt: skip
    except NothingFusedError as error:
        _print_why(terminal, why, error.why)
        terminal.finish({"error": str(error), "calls_fused": 0, **describe_why(error.why)})
        print_error(str(error))
        sys.exit(1)
    written = [] if dry_run else [str(path) for path in (out, bundle) if path is not None]
    if out is not None and not dry_run:
        result.save(out, force=force)
    if bundle is not None and not dry_run:
        with terminal.progress() as progress:
            write_fused_bundle(result, bundle, force=force, progress=progress)
    report = result.to_dict()
    kinds = Counter(result.fused.values())
    terminal.table(("fused", "which was"), [(count, was) for was, count in kinds.items()])
    _print_why(terminal, why, result.why)
    headers = ("batch", "length", "past", "runtime", "before", "ulp", "allowed")
    rows = [
        (r["batch"], r["length"], r["past"], r["runtime"], r["before"], f"{r['ulp']:.3g}",
         f"{r['allowed']:g}")
        for r in report["compared"]
    ]  # fmt: skip
    if rows:
        terminal.table(headers, rows)
    for skipped in report["not_compared"]:
        terminal.line(f"not compared: {skipped}")
    for note in report["notes"]:
        terminal.line(f"note: {note}")
    if dry_run and result.half_tables and not float32_tables:
        half = next(iter(result.half_tables.values()))
        terminal.line(
            f"tables computed in {half} in {len(result.half_tables)} of {len(result.fused)} rotary "
            "calls; --float32-tables computes them in float32"
        )
    done = "nothing was written, it would fuse" if dry_run else "fused"
    where = source if dry_run else ", ".join(written)
    terminal.line(
        f"{where}: {done} {len(result.fused)} rotary calls into {result.nodes} "
        f"nodes; not replaced: {report['calls_not_replaced']}"
    )
    made = {"out": out, "bundle": bundle}
    named = {key: None if dry_run or path is None else str(path) for key, path in made.items()}
    terminal.finish({**named, **report})


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
