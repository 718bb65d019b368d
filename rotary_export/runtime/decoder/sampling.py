"""From logits to tokens: the best one, or a draw; as transformers' `generate`, in numpy."""

from __future__ import annotations

import numpy as np

from rotary_export.runtime.decoder.settings import Settings
from rotary_export.types import Array


def choose_tokens(
    logits: Array, ids: Array, settings: Settings, generator: np.random.Generator
) -> Array:
    """Choose the next token of each row.

    Args:
        logits: (B, V).
        ids: (B, S) int64, the tokens so far with their padding.
        settings: How.
        generator: Of the draws.

    Returns:
        (B,) int64.
    """
    if settings.repetition_penalty != 1 or settings.suppress_tokens:
        logits = _penalize(logits, ids, settings)
    if not settings.do_sample:
        best: Array = np.argmax(logits, axis=-1)
        return best
    probabilities = compute_probabilities(logits, settings)
    ends = np.cumsum(probabilities, axis=-1)
    draws = generator.random(len(ends)) * ends[:, -1]
    found = [np.searchsorted(row, draw, "right") for row, draw in zip(ends, draws, strict=True)]
    return np.array(found, np.int64)


def compute_probabilities(logits: Array, settings: Settings) -> Array:
    """Return the probabilities by which tokens are drawn: temperature, then top_k, then top_p.

    Args:
        logits: (B, V).
        settings: How.

    Returns:
        (B, V) float64; 0 where a token is never drawn.
    """
    scores = logits.astype(np.float64) / settings.temperature
    if 0 < settings.top_k < scores.shape[-1]:
        worst = np.partition(scores, -settings.top_k, axis=-1)[:, -settings.top_k, None]
        scores[scores < worst] = -np.inf
    probabilities = _softmax(scores)
    if settings.top_p < 1:
        order = np.argsort(probabilities, axis=-1)  # the most likely one last, which always stays
        ordered = np.take_along_axis(probabilities, order, axis=-1)
        is_left_out = np.cumsum(ordered, axis=-1) <= 1 - settings.top_p
        is_left_out[:, -1] = False
        ordered[is_left_out] = 0
        np.put_along_axis(probabilities, order, ordered, axis=-1)
    return probabilities


def _softmax(scores: Array) -> Array:
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities: Array = exponents / exponents.sum(axis=-1, keepdims=True)
    return probabilities


def _penalize(logits: Array, ids: Array, settings: Settings) -> Array:
    """Return a copy whose tokens that are there already, or are suppressed, are less likely."""
    scores: Array = logits.astype(np.float32)
    penalty = np.float32(settings.repetition_penalty)
    found = np.take_along_axis(scores, ids, axis=-1)
    np.put_along_axis(scores, ids, np.where(found < 0, found * penalty, found / penalty), axis=-1)
    scores[:, [each for each in settings.suppress_tokens if each < scores.shape[-1]]] = -np.inf
    return scores
