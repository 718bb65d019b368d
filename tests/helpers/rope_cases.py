"""The tables that the tests of rope types sweep. A new rope type adds to this file, and only here.

CASES: rope parameters as Hugging Face configs write them, with sizes of a real model.
BUNDLES: the same with small sizes, of which bundles are exported.
FORMULAS: each type's frequencies once more, in float64, sharing no code with the package.

Types that transformers has are compared with it to the bit, the others with their formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from helpers.hf_modules import ROPE_TYPES as HF_ROPE_TYPES


@dataclass(frozen=True)
class RopeCase:
    """`rope_parameters` of a small Llama config."""

    name: str
    rope: dict[str, Any]
    head_dim: int = 64
    max_position_embeddings: int = 2048
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "hidden_size": 4 * self.head_dim,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": {"rope_theta": 10000.0, **self.rope},
            **self.extra,
        }

    @property
    def rope_type(self) -> str:
        return self.rope["rope_type"]

    @property
    def in_transformers(self) -> bool:
        return self.rope_type in HF_ROPE_TYPES


def _longrope(half: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [1 + 0.01 * i for i in range(half)],
        "long_factor": [1.5 + 0.3 * i for i in range(half)],
        "original_max_position_embeddings": 1024,
        **more,
    }


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
CASES = [
    *(
        RopeCase(f"default-{theta:g}-{dim}", {"rope_type": "default", "rope_theta": theta}, dim)
        for theta in (100.0, 10000.0, 500000.0, 1e7)
        for dim in (4, 32, 80, 128, 256)
    ),
    *(RopeCase(f"linear-{f}", {"rope_type": "linear", "factor": f}) for f in (1.0, 2.5, 8, 0.5)),
    *(
        RopeCase(f"linear-partial-{p}", {"rope_type": "linear", "factor": 2.0} | _partial)
        for p in (0.25, 0.5, 0.75)
        for _partial in ({"partial_rotary_factor": p},)
    ),
    *(
        RopeCase(
            f"dynamic-{f}-{theta:g}", {"rope_type": "dynamic", "factor": f, "rope_theta": theta}
        )
        for f in (1.0, 2.0, 3.7, 8.0)
        for theta in (10000.0, 1e6)
    ),
    RopeCase(
        "dynamic-partial", {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5}
    ),
    RopeCase("dynamic-odd", {"rope_type": "dynamic", "factor": 3.3}, 64, 1500),
    # The formula for long lengths is not, to the bit, that of short ones at the limit.
    RopeCase("dynamic-rounded", {"rope_type": "dynamic", "factor": 2.9}, 64, 173089),
    RopeCase("yarn", _YARN),
    RopeCase(
        "yarn-slow-all",
        _YARN | {"original_max_position_embeddings": 64, "rope_theta": 1e6},
        64,
        256,
    ),
    RopeCase(
        "yarn-fast-all",
        _YARN | {"original_max_position_embeddings": 32768, "rope_theta": 100.0},
        64,
        131072,
    ),
    RopeCase("yarn-40", _YARN | {"factor": 40, "rope_theta": 150000.0}),
    RopeCase("yarn-betas", _YARN | {"beta_fast": 20.0, "beta_slow": 2.5}),
    RopeCase("yarn-equal-ends", _YARN | {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False}),
    RopeCase("yarn-no-truncate", _YARN | {"truncate": False, "rope_theta": 150000.0}),
    RopeCase("yarn-mscale", _YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}),
    RopeCase("yarn-mscale-equal", _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
    RopeCase("yarn-attention", _YARN | {"attention_factor": 1.25}),
    RopeCase("yarn-no-factor", _YARN | {"factor": None}),
    RopeCase("yarn-partial", _YARN | {"partial_rotary_factor": 0.5}, 128),
    RopeCase("longrope", _longrope(32)),
    RopeCase("longrope-factor", _longrope(32, factor=16.0)),
    RopeCase("longrope-attention", _longrope(32, attention_factor=1.19)),
    RopeCase("longrope-partial", _longrope(24, partial_rotary_factor=0.75)),
    RopeCase("longrope-short", _longrope(32), max_position_embeddings=1024),
    RopeCase("llama3", _LLAMA3),
    RopeCase("llama3-32", _LLAMA3 | {"factor": 32.0, "rope_theta": 500000.0}, 128),
    RopeCase("llama3-steep", _LLAMA3 | {"low_freq_factor": 2, "high_freq_factor": 2.5}),
    *(
        RopeCase(
            f"proportional-{p}-{f}",
            {"rope_type": "proportional", "partial_rotary_factor": p, "factor": f},
            512,
        )
        for p in (0.25, 0.3, 1.0)
        for f in (1.0, 8.0)
    ),
]


def sweep(cases: list[RopeCase] = CASES) -> pytest.MarkDecorator:
    """Parametrise a test over `case`."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


# One for each rope type, and what differs in kind.
_FIRST = {case.rope_type: case.name for case in reversed(CASES)}
SOME = [
    case
    for case in CASES
    if case.name in {*_FIRST.values(), "yarn-mscale", "longrope-partial", "proportional-0.25-8.0"}
]
IN_TRANSFORMERS = [case for case in CASES if case.in_transformers]
LENGTH_DEPENDENT = [case for case in IN_TRANSFORMERS if case.rope_type in ("dynamic", "longrope")]

# ---- small sizes: heads of 16 channels, 16 positions before the boundary

BOUNDARY, HALF = 16, 8
_SMALL_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + 0.1 * i for i in range(HALF)],
    "long_factor": [2 + 0.7 * i for i in range(HALF)],
    "original_max_position_embeddings": BOUNDARY,
    "factor": 4.0,
}
BUNDLES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": BOUNDARY},
    "longrope": _SMALL_LONGROPE,
    "mscales": _SMALL_LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": BOUNDARY,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "chunked": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    "interleaved": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    "chunked-longrope": _SMALL_LONGROPE | {"mrope_section": [2, 3, 3]},
    "chunked-dynamic": {"rope_type": "dynamic", "factor": 3.0, "mrope_section": [2, 3, 3]},
}

# ---- the formulas in float64

Array = np.ndarray[Any, np.dtype[np.float64]]


def compute_theta(p: Any, length: int = 1) -> Array:
    """Return the frequencies, (R/2,), of a sequence length."""
    exponent = np.arange(0, p.dim, 2, dtype=np.float64) / p.dim
    return FORMULAS[p.rope_type](p, p.base**-exponent, length)


def _compute_dynamic(p: Any, theta: Array, length: int) -> Array:
    """The base is multiplied so that the slowest pair turns `growth` times slower."""
    growth = p.factor * max(length, p.max_position_embeddings) / p.max_position_embeddings
    growth -= p.factor - 1
    return theta * growth ** (-np.arange(0, p.dim, 2) / (p.dim - 2))


def _compute_yarn(p: Any, theta: Array, length: int) -> Array:
    """Divide the pairs that turn less than beta_slow times, keep those over beta_fast."""
    turns = p.original_max_position_embeddings * theta / (2 * np.pi)
    pair = np.arange(len(theta))
    # The pair at which a number of turns is reached, by inverting `turns`.
    low, high = (
        np.interp(-np.log(beta), -np.log(turns), pair, left=-np.inf, right=np.inf)
        for beta in (p.beta_fast, p.beta_slow)
    )
    slope = math.log(turns[0] / turns[1])
    low, high = (
        math.log(turns[0] / beta) / slope if np.isinf(at) else at
        for at, beta in ((low, p.beta_fast), (high, p.beta_slow))
    )
    if p.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, p.dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((pair - low) / (high - low), 0, 1)
    return theta * ((1 - ramp) + ramp / p.factor)


def _compute_longrope(p: Any, theta: Array, length: int) -> Array:
    is_long = length > p.original_max_position_embeddings
    return theta / np.array(p.long_factor if is_long else p.short_factor)


def _compute_llama3(p: Any, theta: Array, length: int) -> Array:
    turns = p.original_max_position_embeddings * theta / (2 * np.pi)
    keep = np.clip((turns - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor), 0, 1)
    return theta * (keep + (1 - keep) / p.factor)


def _compute_proportional(p: Any, theta: Array, length: int) -> Array:
    return np.where(np.arange(len(theta)) < p.rotated_pairs, theta / p.factor, 0)


# p: the parameters; theta: base ** (-2i / dim), (R/2,); length: of the sequence.
FORMULAS = {
    "default": lambda p, theta, length: theta,
    "linear": lambda p, theta, length: theta / p.factor,
    "dynamic": _compute_dynamic,
    "yarn": _compute_yarn,
    "longrope": _compute_longrope,
    "llama3": _compute_llama3,
    "proportional": _compute_proportional,
}
