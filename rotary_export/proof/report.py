"""The report of a proof: one row per graph, output and way to run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rotary_export.errors import CheckFailedError
from rotary_export.proof.comparison import Error
from rotary_export.proof.generated import Generated
from rotary_export.proof.tolerances import TOLERANCES

FLOAT32_TABLES = (
    "compared with the model whose positions, angles and tables are computed in float32 "
    "(float32_tables), not as its own type has them"
)
_PLAIN = ("tables", "rotate")  # graphs that are not a model's
FORMULA = "formula"  # what a row of a closed form has instead of a runtime


@dataclass
class Row:
    """One line of the report: one output of one graph, run by one runtime.

    Attributes:
        graph: "tables", "rotate" or that of a model.
        output: Its name.
        runtime: What ran it.
        kernel_path: As `Session.kernel_path`.
        eager: Error against eager PyTorch.
        eager_tolerance: Key of TOLERANCES.
        oracle_tolerance: Key of TOLERANCES; None: a whole model has no oracle.
        oracle: Error against the float64 oracle (float64 outputs: long double).
        noise: By how much rounding alone moves eager, in the unit of `eager`; of a whole model.
        case: The inputs for which the error is the largest of what is allowed, of a whole model; of
            a closed form, the element for which it is.
        place: Batch row and position of the largest error; of a whole model.
    """

    graph: str
    output: str
    runtime: str
    kernel_path: str
    eager_tolerance: str
    oracle_tolerance: str | None
    eager: Error = field(default_factory=Error)
    oracle: Error = field(default_factory=Error)
    noise: float = 0.0
    case: str = ""
    place: str = ""

    @property
    def eager_allowed(self) -> float:
        """The largest error against eager, in ulp."""
        tolerance = TOLERANCES[self.eager_tolerance]
        return max(tolerance.max_ulp, tolerance.noise_factor * self.noise)

    @property
    def eager_share(self) -> float:
        """The error against eager as a share of what is allowed."""
        if self.eager_allowed:
            return self.eager.max_ulp / self.eager_allowed
        return 0.0 if self.eager.exact else float("inf")

    @property
    def passed(self) -> bool:
        """Whether both errors are within their tolerances."""
        return self.eager_share <= 1 and (
            self.oracle_allowed is None or self.oracle.max_ulp <= self.oracle_allowed
        )

    @property
    def oracle_allowed(self) -> float | None:
        """The largest error against the oracle, in ulp."""
        if self.oracle_tolerance is None:
            return None
        return TOLERANCES[self.oracle_tolerance].max_ulp

    def to_dict(self) -> dict[str, Any]:
        """Return the row as values that JSON can express."""
        return {
            **asdict(self),
            "eager": self.eager.to_dict(),
            "oracle": self.oracle.to_dict(),
            "eager_allowed": self.eager_allowed,
            "oracle_allowed": self.oracle_allowed,
            "passed": self.passed,
        }


@dataclass
class Report:
    """What `verify` found.

    Attributes:
        rows: One per output, graph and runtime.
        shapes: What was tried, by graph.
        skipped: Runtimes that are not here, and why.
        unverified: Sizes and values of a model that were not compared, and why.
        notes: What else a reader must know, such as that the proof was a quick one.
        reference: What the rows compare with.
        generated: Tokens that a decoder generates, compared with the model's own.
    """

    rows: list[Row] = field(default_factory=list)
    shapes: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unverified: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reference: str = "eager PyTorch"
    generated: list[Generated] = field(default_factory=list)

    def add(self, rows: Sequence[Row], unverified: Mapping[str, str]) -> None:
        """Add what a part of the proof found."""
        self.rows += rows
        self.unverified |= unverified

    def join(self, other: Report) -> None:
        """Add the report of another graph."""
        self.add(other.rows, other.unverified)
        self.shapes |= other.shapes
        self.skipped |= other.skipped
        self.notes += [note for note in other.notes if note not in self.notes]
        self.generated += other.generated

    @property
    def passed(self) -> bool:
        """Whether every row is within its tolerances, and every token is the model's own."""
        return all(row.passed for row in self.rows) and all(g.passed for g in self.generated)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can express."""
        generated = [each.to_dict() for each in self.generated]
        return {
            "passed": self.passed,
            "rows": [row.to_dict() for row in self.rows],
            "shapes": self.shapes,
            "skipped": self.skipped,
            "unverified": self.unverified,
            "notes": self.notes,
            "reference": self.reference,
            **({"generated": generated} if generated else {}),
        }

    def find_failure(self) -> Row | None:
        """Return the row that is the most out of its tolerances; None: all are within.

        An output of a whole model comes before its tables, which may be wrong where no output is.
        """
        failed = [row for row in self.rows if not row.passed]
        return max(failed, key=lambda r: (r.graph not in _PLAIN, r.eager_share), default=None)


def check_report(report: Report) -> None:
    """Refuse a bundle that is not what eager computes.

    Raises:
        CheckFailedError: A row is out of its tolerances; the message names the worst one.
    """
    row = report.find_failure()
    if row is not None:
        raise CheckFailedError(describe_failure(row))


def describe_failure(row: Row, outcome: str = "nothing was written") -> str:
    """Return in one sentence what differs, where, by how much, and what is allowed.

    Args:
        row: That is out of its tolerances.
        outcome: What became of the bundle.
    """
    if row.runtime == FORMULA:
        return f"{outcome}: {row.case}"
    if row.oracle_tolerance is None:
        details = (
            f" ({row.eager_allowed:.3g} are allowed, the model's own rounding noise is "
            f"{row.noise:.3g}; {', '.join(filter(None, (row.case, row.place)))})"
        )
    else:
        details = f" and from the oracle by {row.oracle.max_ulp:.3g} ulp at {row.oracle.worst}"
    return (
        f"the export is not equal to eager, {outcome}: {row.graph}.{row.output} by "
        f"{row.runtime} differs from eager by {row.eager.max_ulp:.3g} ulp at {row.eager.worst}"
        f"{details}"
    )
