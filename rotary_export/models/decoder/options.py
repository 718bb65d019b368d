"""What `export_model` is asked for of a decoder."""

from __future__ import annotations

from dataclasses import dataclass

from rotary_export.errors import RotaryExportError

FULL, WINDOW, STATIC, NONE = "full", "window", "static", "none"
CACHES = (FULL, WINDOW, STATIC, NONE)


@dataclass(frozen=True)
class DecoderOptions:
    """The cache and the logits of the graph.

    Attributes:
        cache: One of CACHES; None: as the example inputs have it.
        last_logits: Only the logits of the last position.
        max_cache_len: How many positions a static cache holds.
        inputs_embeds: The graph reads embeddings; another one embeds tokens.
    """

    cache: str | None = None
    last_logits: bool = False
    max_cache_len: int | None = None
    inputs_embeds: bool = False

    def __post_init__(self) -> None:
        if self.cache is not None and self.cache not in [*CACHES]:  # a list has no hash
            raise RotaryExportError(f"cache must be one of {', '.join(CACHES)}, got {self.cache!r}")
        if not isinstance(self.last_logits, bool):
            raise RotaryExportError(f"last_logits must be a bool, got {self.last_logits!r}")
        if not isinstance(self.inputs_embeds, bool):
            raise RotaryExportError(f"inputs_embeds must be a bool, got {self.inputs_embeds!r}")
        if (self.cache == STATIC) != (self.max_cache_len is not None):
            raise RotaryExportError(
                "max_cache_len (--max-cache-len) is for cache 'static', which needs it; got cache "
                f"{self.cache!r}, max_cache_len {self.max_cache_len!r}"
            )
        if self.max_cache_len is not None and (
            type(self.max_cache_len) is not int or self.max_cache_len < 2
        ):
            raise RotaryExportError(
                f"max_cache_len must be an int >= 2, got {self.max_cache_len!r}"
            )
