"""The names of dynamic sizes and of cached tensors: the same in graphs, manifests and the proof.

A size is a number, a name, or a sum of terms, each a number, a name or a multiple of a name:
"past_seq_len + seq_len", "8 * height", "4 * n + 1". What a layer with a sliding window keeps is
"min(past_seq_len, 4095)".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

BATCH, SEQ, PAST = "batch_size", "seq_len", "past_seq_len"
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")
_BOUNDED = re.compile(r"min\((\w+), ([1-9][0-9]{0,17})\)")
TOTAL = f"{PAST} + {SEQ}"  # what a key/value cache contains after a step


def is_past(name: str) -> bool:
    """Return whether an input's name is that of cached keys or values, (B, N, S, H)."""
    return re.fullmatch(r"past_key_values\.\d+\.(decoder\.)?(key|value)", name) is not None


def is_encoder_past(name: str) -> bool:
    """Return whether an input's name is that of keys or values of an encoder, which do not grow."""
    return re.fullmatch(r"past_key_values\.\d+\.encoder\.(key|value)", name) is not None


def is_encoded(name: str) -> bool:
    """Return whether an input's name is that of what an encoder has made for a decoder."""
    return is_encoder_past(name) or name == "encoder_attention_mask"


def is_present(name: str) -> bool:
    """Return whether an output's name is that of cached keys or values."""
    past = name.replace("present", "past_key_values", 1)
    return is_past(past) or is_encoder_past(past)


def name_output(past: str) -> str:
    """Return the name of the output that contains an input of cached keys or values, grown."""
    return past.replace("past_key_values", "present", 1)


def read_terms(dim: str) -> list[tuple[int, str]]:
    """Return the terms of a dynamic size: factor and name; the name of a number is ""."""
    terms = []
    for text in dim.split(" + "):
        factor, _, name = text.partition(" * ")
        if _NUMBER.fullmatch(text):
            terms.append((int(text), ""))
        else:
            multiple = _NUMBER.fullmatch(factor) and factor != "0" and name
            terms.append((int(factor), name) if multiple else (1, text))
    return terms


def bound_dim(name: str, largest: int) -> str:
    """Return the size that is a name's, but never more than the largest."""
    return f"min({name}, {largest})"


def read_bounded(dim: str) -> tuple[str, int] | None:
    """Return the name and the largest size of what `bound_dim` wrote; None: it is another dim."""
    match = _BOUNDED.fullmatch(dim)
    return (match[1], int(match[2])) if match else None


def list_names(dims: Iterable[int | str]) -> list[str]:
    """Return the names in sizes, each once."""
    terms = (term for dim in dims if isinstance(dim, str) for term in read_terms(dim))
    names = ((read_bounded(name) or (name,))[0] for _, name in terms if name)
    return list(dict.fromkeys(names))


def compute_dim(dim: str, sizes: Mapping[str, int]) -> int:
    """Return a dynamic size.

    Raises:
        KeyError: It has a name that is not in `sizes`.
    """
    if bounded := read_bounded(dim):
        name, largest = bounded
        return min(sizes[name], largest)
    return sum(factor * sizes[name] if name else factor for factor, name in read_terms(dim))


def solve_dim(dim: str, size: int) -> tuple[str, int] | None:
    """Return the only name in a dynamic size, and its value where the size is `size`.

    Returns:
        None if there are several names, or if it is never of that size, or of several.
    """
    if bounded := read_bounded(dim):
        name, largest = bounded
        return (name, size) if 0 <= size < largest else None
    terms = read_terms(dim)
    names = [(factor, name) for factor, name in terms if name]
    if len(names) != 1:
        return None
    factor, name = names[0]
    value, rest = divmod(size - sum(number for number, other in terms if not other), factor)
    return (name, value) if value >= 0 and not rest else None


def solve_sum(dim: str, size: int, sizes: dict[str, int]) -> bool:
    """Return whether a dynamic size is `size`; the only name in it that is unknown becomes known.

    Args:
        dim: The size.
        size: What it is to be.
        sizes: Of the names that are known; receives that of the unknown one.
    """
    unknown = [name for name in list_names([dim]) if name not in sizes]
    if not unknown:
        return compute_dim(dim, sizes) == size
    (name, *others), rest = unknown, size - compute_dim(dim, {**dict.fromkeys(unknown, 0), **sizes})
    if others or rest < 0 or (1, name) not in read_terms(dim):
        return False
    sizes[name] = rest
    return True
