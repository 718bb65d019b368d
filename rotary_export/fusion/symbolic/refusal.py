"""Why a value is not a rotation: what was found, and which check decided."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rotary_export.fusion.symbolic.nearest import describe_nearest
from rotary_export.fusion.symbolic.pairs import Terms
from rotary_export.fusion.symbolic.polynomials import UnknownShapeError

_FUSION = Path(__file__).parents[1]

# The functions that refuse, in the order in which a value gets to them: the one that got furthest
# is the one that is reported.
CHECKS = (
    "trailing_shape",
    "find_rotation",
    "check_terms",
    "find_rotary_dim",
    "find_layout",
    "match_pairs",
    "find_table",
    "make_plan",
)


class NotARotationError(Exception):
    """A value is not the rotation of another.

    Args:
        reason: What was found.
        channels: Terms of the value's channels, as far as they could be read.
    """

    def __init__(self, reason: str, channels: Sequence[Terms] = ()) -> None:
        super().__init__(reason)
        self.channels = channels


@dataclass(frozen=True)
class Refusal:
    """Why a value is not replaced.

    Attributes:
        reason: What was found.
        check: File and function that decided.
        stage: How far the value got, by `CHECKS`.
        channels: Terms of its channels, as far as they could be read.
    """

    reason: str
    check: str
    stage: int = len(CHECKS)
    channels: tuple[Terms, ...] = ()

    @property
    def rank(self) -> tuple[int, int]:
        """How far the value got: the check, then its channels that are sums of two products."""
        return self.stage, sum(terms is not None and len(terms) == 2 for terms in self.channels)

    @property
    def nearest(self) -> str:
        """The nearest rotation that it could have been; empty: nothing is near."""
        return describe_nearest(self.channels)


def make_refusal(error: UnknownShapeError | NotARotationError) -> Refusal:
    """Make a refusal of what a check raised; the check is the function that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    stage = CHECKS.index(frame.name) if frame.name in CHECKS else 0
    check = name_check(frame.filename, frame.name)
    if isinstance(error, UnknownShapeError):
        return Refusal(f"the shape of {error} is not known", check, stage)
    return Refusal(str(error), check, stage, tuple(error.channels))


def name_check(file: str, function: str) -> str:
    """Return "fusion/rules/partial.py: PartialRule.check"."""
    path = Path(file)
    inside = path.relative_to(_FUSION.parent) if _FUSION in path.parents else path
    return f"{inside.as_posix()}: {function}"
