"""The fields of a config, each checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rotary_export.errors import RotaryExportError
from rotary_export.rope import families


class Fields:
    """The fields of a config, or of one entry of its rope_parameters.

    Args:
        source: A dict, or an object that is read through its attributes.
        where: The name of the source in error messages.
    """

    def __init__(self, source: Any, where: str) -> None:
        self._source = source
        self._where = where

    def get(self, *names: str) -> Any:
        """Return the first field that exists and is not None."""
        for name in names:
            if isinstance(self._source, Mapping):
                value = self._source.get(name)
            else:
                value = getattr(self._source, name, None)
            if value is not None:
                return value
        return None

    def number(self, *names: str, default: float | None = None) -> float:
        """Return a number in (0, 1e30), whose products with others stay finite."""
        value = self._require(names, default)
        if not _is_number(value):
            raise self.error(names[0], "must be a number > 0 and < 1e30", value)
        return float(value)

    def count(self, *names: str, default: int | None = None) -> int:
        """Return an int >= 1."""
        value = self._require(names, default)
        if not _is_number(value) or value != int(value) or not 1 <= value < 2**31:
            raise self.error(names[0], "must be an int >= 1 and < 2**31", value)
        return int(value)  # some checkpoints write 4096.0

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """Return `length` finite numbers > 0."""
        values = self._require((name,), None)
        if not isinstance(values, (list, tuple)) or not all(map(_is_number, values)):
            raise self.error(name, "must be a list of numbers > 0 and < 1e30", values)
        if len(values) != length:
            raise self.error(name, f"must have rotary_dim / 2 = {length} numbers", len(values))
        return tuple(float(v) for v in values)

    def _require(self, names: tuple[str, ...], default: Any) -> Any:
        value = self.get(*names)
        if value is None:
            value = default
        if value is None:
            raise RotaryExportError(f"{' or '.join(names)} is missing in {self._where}")
        return value

    def error(self, name: str, expected: str, got: Any) -> RotaryExportError:
        """Return the error for a field that is not what it must be."""
        return RotaryExportError(f"{name} {expected}, got {got!r} in {self._where}")


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < 1e30


@dataclass(frozen=True)
class Entry:
    """One entry of a config's rope parameters, as the reader of a rope type receives it.

    Attributes:
        own: The keys of the entry.
        top: The keys of the config, of the layers that the entry is for.
        model_type: The family; empty where the config does not contain it.
        head_dim: H.
        share: Which share of a head is rotated (`partial_rotary_factor`).
    """

    own: Fields
    top: Fields
    model_type: str
    head_dim: int
    share: float

    def read_original_length(self) -> int:
        """Read the number of positions that the model had before it was made longer."""
        name = "original_max_position_embeddings"
        if self.top.get(name) is not None:
            return self.top.count(name)
        if self.own.get(name) is not None:
            return self.own.count(name)
        return self.top.count(*families.LENGTH_KEYS)

    def read_ratio(self, original_length: int) -> float:
        """Read factor; without one it is the ratio of the lengths."""
        if self.own.get("factor") is not None:
            return self.own.number("factor")
        return self.top.count(*families.LENGTH_KEYS) / original_length
