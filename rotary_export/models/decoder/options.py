"""What `export_model` is asked for of a decoder."""

from __future__ import annotations

from dataclasses import dataclass

from rotary_export.errors import RotaryExportError

FULL, NONE = "full", "none"
CACHES = (FULL, NONE)


@dataclass(frozen=True)
class DecoderOptions:
    """The cache and the logits of the graph.

    Attributes:
        cache: One of CACHES; None: as the example inputs have it.
        last_logits: Only the logits of the last position.
    """

    cache: str | None = None
    last_logits: bool = False

    def __post_init__(self) -> None:
        if self.cache is not None and self.cache not in [*CACHES]:  # a list has no hash
            raise RotaryExportError(f"cache must be one of {', '.join(CACHES)}, got {self.cache!r}")
        if not isinstance(self.last_logits, bool):
            raise RotaryExportError(f"last_logits must be a bool, got {self.last_logits!r}")
