"""Options and arguments that several commands share, each stated once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from rotary_export.bundle.manifest import DEFAULT_FORMATS, SUFFIXES
from rotary_export.bundle.paths import check_path
from rotary_export.op import spec

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class PathType(click.Path):
    """The path of a file or folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what is not a path, then convert."""
        check_path(value)
        return super().convert(value, param, ctx)


class IntegerList(click.ParamType[list[int]]):
    """Integers >= 0, with commas between them."""

    name = "1,2,3"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert, or fail with the first part that is not one."""
        if not isinstance(value, str):
            return value
        for part in value.split(","):
            if not re.fullmatch(r"\s*[0-9]{1,18}\s*", part):
                self.fail(f"{part!r} is not an integer >= 0", param, ctx)
        return [int(part) for part in value.split(",")]


bundle_argument = click.argument("bundle", type=PathType())
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")

allow_code_option = click.option(
    "--allow-code", is_flag=True, help="Open TorchScript and .pt2 files, whose code may run here."
)
revision_option = click.option(
    "--revision", help="Of a SOURCE on the hub: a branch, a tag or a commit."
)


def out_option(required: bool = True) -> Decorator:
    """Return `--out`, the folder that a command writes."""
    return click.option("--out", type=PathType(), required=required, help="Folder to write.")


def force_option(what: str) -> Decorator:
    """Return `--force`, which replaces `what`."""
    return click.option("--force", is_flag=True, help=f"Replace {what}.")


def bundle_options(dtype: str | None, requires_out: bool = True) -> Decorator:
    """Return the options of every command that writes a bundle.

    Args:
        dtype: The default of `--dtype`; None: that of the model.
        requires_out: Whether `--out` must be given.
    """
    options = (
        click.option(
            "--format",
            "formats",
            type=click.Choice(list(SUFFIXES)),
            multiple=True,
            default=DEFAULT_FORMATS,
            show_default=True,
            help="May be repeated.",
        ),
        click.option(
            "--opset", type=int, default=23, show_default=True, help="Of ai.onnx, 18 to 25."
        ),
        click.option(
            "--dtype",
            type=click.Choice(spec.X_TYPES),
            default=dtype,
            show_default=dtype is not None or "that of the model",
        ),
        out_option(requires_out),
        force_option("an existing bundle"),
        json_option,
    )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def decoder_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a decoder: its cache, its logits."""
    options = (
        click.option(
            "--cache",
            type=click.Choice(["full", "window", "static", "none"]),
            help="Key/value cache of a causal language model.  [default: full, or as the factory's "
            "example inputs have it]",
        ),
        click.option("--max-cache-len", type=int, help="Positions of a static cache."),
        click.option("--last-logits", is_flag=True, help="Only the logits of the last position."),
        click.option(
            "--inputs-embeds",
            is_flag=True,
            help="Read embeddings in place of token ids; a graph embed_tokens makes those.",
        ),
        click.option(
            "--prompts",
            type=PathType(),
            help="File of prompts, one a line, for the proof.  [default: random tokens]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command
