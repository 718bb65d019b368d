"""Silence what torch, its exporters and transformers print. Imports the standard library only."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

EXPORTERS = ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")
LOADERS = ("torch._export.serde.serialize",)


def quiet_torch() -> AbstractContextManager[None]:
    """Silence what torch's exporters log and warn of; their errors are exceptions."""
    return _silence(EXPORTERS)


def quiet_loaders() -> AbstractContextManager[None]:
    """Silence that TorchScript is deprecated, and that a `.pt2` names sizes it does not use.

    Errors are exceptions.
    """
    return _silence(LOADERS)


@contextmanager
def hide_progress_bars(transformers: Any) -> Iterator[None]:
    """Hide the bars of transformers, such as "Loading weights".

    Args:
        transformers: The module.
    """
    logging_of = transformers.utils.logging
    had_bars = logging_of.is_progress_bar_enabled()
    logging_of.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging_of.enable_progress_bar()


@contextmanager
def _silence(names: Sequence[str]) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
