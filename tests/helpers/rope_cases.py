"""One table of rope parameters, as Hugging Face configs write them: the scaling tests sweep it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest


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
SOME = [
    case
    for case in CASES
    if case.name
    in {
        "default-10000-32", "linear-2.5", "dynamic-2-10000", "dynamic-2.0-10000", "yarn",
        "yarn-mscale", "longrope", "longrope-partial", "llama3", "proportional-0.25-8.0",
    }
]  # fmt: skip
MOVING = [case for case in CASES if case.rope_type in ("dynamic", "longrope")]
