"""The command `fuse`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

import rotary_export
from rotary_export.cli.options import force_option, json_option
from rotary_export.cli.terminal import Terminal


@click.command()
@click.argument("source", metavar="IN.onnx", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.onnx", type=click.Path(path_type=Path))
@click.option(
    "--shape",
    "shapes",
    type=(click.IntRange(1), click.IntRange(1), click.IntRange(0)),
    multiple=True,
    metavar="BATCH_SIZE SEQ_LEN PAST_LEN",
    help="What to compare at; may be repeated; default: three shapes.",
)
@force_option("an existing file")
@json_option
def fuse(
    source: Path, out: Path, shapes: tuple[tuple[int, int, int], ...], force: bool, as_json: bool
) -> None:
    """Replace each rotary embedding of IN.onnx by one fused node, and prove it equal.

    IN.onnx may come from any exporter. It is run before and after; OUT.onnx is written only if the
    outputs agree.
    """
    from rotary_export.fusion.fuse import check_out

    terminal = Terminal(as_json)
    check_out(out, force, [source])
    with terminal.progress() as progress:
        progress("import onnx")
        result = rotary_export.fuse(source, shapes=shapes or None, progress=progress)
        result.save(out, force=force)
    report = result.to_dict()
    kinds = Counter(result.fused.values())
    terminal.table(("fused", "which was"), [(count, how) for how, count in kinds.items()])
    for left in result.left:
        terminal.line(f"left: {left.node}: {left.reason or 'it is no rotation'}")
    headers = ("batch", "length", "past", "runtime", "before", "ulp", "allowed")
    terminal.table(
        headers,
        [
            (r["batch"], r["length"], r["past"], r["runtime"], r["before"], f"{r['ulp']:.3g}",
             f"{r['allowed']:g}")
            for r in report["compared"]
        ],
    )  # fmt: skip
    for why in report["not_compared"]:
        terminal.line(f"not compared: {why}")
    terminal.line(
        f"{out}: {len(result.fused)} rotary calls fused into {result.nodes} nodes, "
        f"{len(result.left)} left"
    )
    terminal.finish({"out": str(out), **report})
