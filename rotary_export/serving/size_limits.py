"""The largest request that a bundle can answer, and how large its body may be."""

from __future__ import annotations

from rotary_export.bundle.dims import BATCH, PAST, SEQ, compute_dim, list_names
from rotary_export.bundle.manifest import GraphInfo, Manifest

MAX_REQUEST_MIB = 64  # of a bundle whose largest request is larger, or not known
_NUMBER_BYTES = 32  # in JSON: 24 of a float64, a comma, spaces; gRPC's are shorter
_REST_BYTES = 64 << 10  # names, shapes, parameters


def count_numbers(manifest: Manifest, graph: GraphInfo, max_batch_size: int) -> int | None:
    """Return how many numbers the largest request contains.

    It has `max_batch_size` rows. A sequence is as long as the bundle's longest.

    Args:
        manifest: Of the bundle.
        graph: Of the bundle.
        max_batch_size: Largest number of rows of a run.

    Returns:
        None if a dynamic size has no largest value.
    """
    longest = manifest.config.get("max_seq_len") or manifest.config.get("max_positions")
    lengths = {SEQ: longest, PAST: longest} if longest else {}
    largest = {**lengths, **graph.max_size, BATCH: max_batch_size}
    total = 0
    for info in graph.inputs:
        if not set(list_names(info.shape)) <= largest.keys():
            return None
        count = 1
        for dim in info.shape:
            count *= compute_dim(dim, largest) if isinstance(dim, str) else dim
        total += count
    return total


def find_largest_body(numbers: int | None, max_request_mib: int | None) -> int:
    """Return the largest number of bytes of a request's body, or of its gRPC message.

    Args:
        numbers: As `count_numbers` returns.
        max_request_mib: What the user has chosen; None: as the bundle needs, at most
            MAX_REQUEST_MIB.
    """
    if max_request_mib is not None:
        return max_request_mib << 20
    most = MAX_REQUEST_MIB << 20
    return most if numbers is None else min(most, numbers * _NUMBER_BYTES + _REST_BYTES)
