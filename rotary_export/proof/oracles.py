"""The oracle of each kind of rope."""

from __future__ import annotations

from rotary_export.graphs.config import ExportConfig
from rotary_export.proof.oracle import Oracle
from rotary_export.proof.scaled_oracle import ScaledOracle
from rotary_export.types import Arrays

ORACLES = {"plain": Oracle, "scaled": ScaledOracle}  # by `RopeKind.kind`


def make_oracle(config: ExportConfig, tables: Arrays, rotate: Arrays) -> Oracle:
    """Make the oracle of a bundle; arguments as `Oracle`."""
    return ORACLES[config.rope.kind](config, tables, rotate)
