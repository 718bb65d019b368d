"""`rotary-export`: export, fuse, verify, run, generate, bench, deploy, serve, inspect, doctor.

Exit codes: 0 fine, 1 a check failed, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from rotary_export.cli.deploy_serve import deploy, serve
from rotary_export.cli.examples import format_examples
from rotary_export.cli.export import export, export_model
from rotary_export.cli.fuse import fuse
from rotary_export.cli.inspect import doctor, inspect
from rotary_export.cli.terminal import print_error
from rotary_export.cli.verify_run import bench, generate, run, verify
from rotary_export.errors import CheckFailedError, InterruptedWarning, RotaryExportError
from rotary_export.package import EXPORT_PACKAGES, __version__, describe_missing


class _Group(click.Group):
    """Turns the package's errors into one line and an exit code; no traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["as_json"] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always", InterruptedWarning)
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            try:
                return super().invoke(ctx)
            except BrokenPipeError:  # the reader, for example `head`, has ended
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(0)
            except KeyboardInterrupt:
                self._fail("interrupted", 128 + signal.SIGINT)
            except CheckFailedError as error:
                self._fail(str(error), 1)
            except RotaryExportError as error:
                self._fail(str(error), 2)
            except ModuleNotFoundError as error:
                if error.name not in EXPORT_PACKAGES:
                    raise
                self._fail(describe_missing("this", error.name, "export"), 2)
            except OSError as error:
                self._fail(f"{error.strerror or error}: {error.filename}", 2)

    @staticmethod
    def _fail(message: str, code: int) -> None:
        if click.get_current_context().meta["as_json"]:
            print(json.dumps({"error": message}))
        print_error(message)
        sys.exit(code)


def _show_warning(
    show: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any
) -> None:
    """Print what was done about an interrupted run as a line; other warnings as Python does."""
    if issubclass(category, InterruptedWarning):
        print_error(str(message))
    else:
        show(message, category, *where)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Take rotary position embeddings out of PyTorch, run them anywhere, prove them equal.

    Exit codes: 0 fine, 1 a check failed, 2 wrong usage, 130 Ctrl-C.
    """


for _command in (
    export, export_model, fuse, verify, run, generate, bench, deploy, serve, inspect, doctor
):  # fmt: skip
    assert _command.name
    _command.epilog = "\n\n".join(filter(None, (format_examples(_command.name), _command.epilog)))
    cli.add_command(_command)
cli.epilog = format_examples("cli")
