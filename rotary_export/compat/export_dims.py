"""The dimensions by which `torch.export` is told what may vary: names, multiples, hints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.export import Dim


@dataclass(frozen=True)
class GivenDim:
    """A `torch.export.Dim`.

    Attributes:
        text: Its name, or that of what it derives from, as in "8 * n"; "" of a hint.
        smallest: Of the name in it; None: any.
        largest: Likewise.
        is_fixed: It says that the size does not vary.
    """

    text: str = ""
    smallest: int | None = None
    largest: int | None = None
    is_fixed: bool = False


def read_dim(given: Any) -> GivenDim | None:
    """Read a Dim, a derived one or a hint (`Dim.AUTO`, `Dim.DYNAMIC`, `Dim.STATIC`).

    Returns:
        None if it is something else.
    """
    if isinstance(given, type(Dim.AUTO)):
        smallest, largest = (_read_number(getattr(given, name, None)) for name in ("min", "max"))
        return GivenDim("", smallest, largest, given.type == Dim.STATIC.type)
    if not isinstance(given, Dim):
        return None
    root = getattr(given, "root", given)  # of a derived one
    text = str(given.__name__).replace("*", " * ")
    return GivenDim(text, _read_number(root.min), _read_number(root.max))


def _read_number(value: Any) -> int | None:
    """Return a bound; None where there is none, which torch writes as an infinite number."""
    return value if type(value) is int else None
