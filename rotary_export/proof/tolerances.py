"""Every tolerance of the proof, and why it is what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tolerance:
    """A bound and why it is what it is.

    Attributes:
        max_ulp: Largest error allowed; 0 means equal to the bit.
        reason: Why it can't be smaller.
        noise_factor: An error of as many times the noise is allowed too.
    """

    max_ulp: float
    reason: str
    noise_factor: float = 0.0


# Let u be half an ulp of the largest magnitude m in a head vector. The two products of an output
# sum to at most sqrt(2) m: k roundings of each cost less than 2.83 k u, their sum costs 1 u more.
TOLERANCES = {
    # Against eager, given the same tables.
    "exact": Tolerance(0, "the same operations in the same order on the same numbers, no FMA"),
    "scale": Tolerance(2, "Pow of ONNX Runtime and of numpy differs from torch's by an ulp"),
    "native": Tolerance(4, "ONNX Runtime's kernel may use FMA; both are within 2 of the truth"),
    "native-xpos": Tolerance(
        10, "the scale is folded into the tables, which are rounded again: both are within 5"
    ),
    "cos-sin": Tolerance(
        2, "Cos and Sin of ONNX Runtime and of numpy differ from torch's by an ulp (of 1)"
    ),
    "computed": Tolerance(4, "as `native`, with Cos and Sin that differ by an ulp (of 1)"),
    "native-half": Tolerance(1, "a float32 result that differs by an ulp can round the other way"),
    "bf16-truncated": Tolerance(1, "OpenVINO turns some float32 results to bfloat16 towards zero"),
    # A whole model, in ulp of the largest magnitude of an output, against eager.
    "model": Tolerance(
        16, "sums are taken in another order, and layers carry the differences on", 6
    ),
    "model-half": Tolerance(
        4, "eager rounds to the half type where the op and fused kernels compute in float32", 6
    ),
    # A model that was fused, in ulp of the largest magnitude, against the model before.
    "fused": Tolerance(
        256, "a rotary call differs by `native`; softmax, norms and products enlarge that 64 times"
    ),
    "fused-half": Tolerance(32, "as `fused`, 8 times: the half type hides what is smaller"),
    "far-tables": Tolerance(
        2, "the angle, its cosine and xPos's power are rounded; in ulp of the last position"
    ),
    # Against the oracle.
    "oracle-freqs": Tolerance(1.5, "position / interpolation_factor and the product are rounded"),
    "oracle-scale": Tolerance(2, "the exponent is rounded, then Pow; per unit of exponent"),
    "oracle-angle": Tolerance(2, "in ulp of the angle, which is rounded before its cos and sin"),
    "oracle-rotate": Tolerance(2, "k = 1: (2.83 + 1) u"),
    "oracle-xpos": Tolerance(5, "k = 3, with the scale and, for the key, its reciprocal"),
    "oracle-half": Tolerance(0.51, "computed in float32 and rounded once to nearest"),
    # A buffer against its closed form.
    "formula": Tolerance(
        8, "eight roundings (base, Pow, 1 / x, factors), and the exponent's times ln(base)"
    ),
}

FUSED = "fused"  # the key of a fused file's facts in a manifest's config


def judge_fused(config: Mapping[str, Any], output: str, dtype: str) -> tuple[str, str]:
    """Return the type whose ulp an output of a fused model is judged by, and its tolerance.

    Args:
        config: A manifest's, of a fused file.
        output: Its name.
        dtype: Its type, which may be wider than the arithmetic before it.
    """
    narrowest = str(config[FUSED]["narrowest"].get(output, dtype))
    return narrowest, "fused-half" if narrowest in ("float16", "bfloat16") else "fused"
