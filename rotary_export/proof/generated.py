"""Tokens that a decoder generates, compared with those of the model's own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A token that is another one than the model's own, after the same tokens.

    Attributes:
        row: Of the batch.
        token: Its index among the new tokens.
        wanted: The model's own token.
        got: The decoder's.
        gap: The model's logit of its own token, less that of the other.
        noise: By how much rounding alone moves the model's logits there.
    """

    row: int
    token: int
    wanted: int
    got: int
    gap: float
    noise: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone can exchange the two tokens."""
        return self.gap < self.noise

    def describe(self) -> str:
        """Return the difference in words."""
        tie = ": a tie within the noise" if self.is_tie else ""
        return (
            f"token {self.token} of row {self.row} is {self.got}, the model's is {self.wanted}; "
            f"its logits differ by {self.gap:.3g}, rounding moves them by {self.noise:.3g}{tie}"
        )


@dataclass(frozen=True)
class Generated:
    """The tokens of one way to generate.

    Attributes:
        way: In words.
        tokens: How many were compared.
        differences: Those that differ, up to the first that is no tie.
    """

    way: str
    tokens: int
    differences: Sequence[Difference] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every difference is a tie."""
        return all(each.is_tie for each in self.differences)

    def describe(self) -> str:
        """Return what was found, in one line."""
        found = "; ".join(each.describe() for each in self.differences)
        return f"{self.way}: {len(self.differences)} of {self.tokens} tokens differ" + (
            f" ({found})" if found else ""
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as values that JSON can express."""
        return {
            "way": self.way,
            "tokens": self.tokens,
            "differences": [asdict(e) | {"is_tie": e.is_tie} for e in self.differences],
            "passed": self.passed,
        }
