"""The faults of an exported model that are planted while it is traced: each makes a wrong graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fault_plants import (
    Plant,
    append_in_front,
    approximate_gelu,
    in_attention,
    in_attribute,
    in_frequencies,
    in_layout,
    in_mask,
    in_modules,
    in_op,
    in_positions,
    in_tables,
    keep_slot,
    pair_heads_wrongly,
    restore_heads,
    round_weight,
    scale_base,
    scale_scores,
    scale_second,
    see_next,
    shorten,
    skip_last_pair,
    take_first_row,
    use_query_scale,
    widen_window,
)

TRACED_ROWS = 12  # positions of the traced inputs, past ones included


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: What is wrong when it is planted.
        kind: What it is part of.
        subject: The model that it is planted in, a key of SUBJECTS.
        plant: Plants it in a model, for as long as the context lasts; the second argument is its
            size.
        sizes: Factors, the nominal one first, then smaller ones; none: it has no size.
    """

    name: str
    kind: str
    subject: str
    plant: Plant
    sizes: tuple[float, ...] = ()

    @property
    def nominal(self) -> float:
        """The size that decides whether the fault counts; 1 if it has none."""
        return self.sizes[0] if self.sizes else 1.0


_FINE = (1.02, 1.005, 1.001, 1.0005, 1.0002, 1.0001, 1.00002)
_FINER = _FINE[2:]
_COARSE = (10.0, 2.0, 1.2, 1.05, *_FINE[:3])
_HALF = torch.float16

FAULTS = [
    Fault("all positions + 1", "positions", "llama", in_positions(lambda p, _: p + 1)),
    Fault(
        "all positions + 1, with a cache",
        "positions",
        "llama with a cache",
        in_positions(lambda p, _: p + 1),
    ),
    Fault(
        "positions from 0 on",
        "positions",
        "llama",
        in_positions(lambda p, _: torch.arange(p.shape[-1]).expand_as(p)),
    ),
    Fault(
        "positions from 0 on, with a cache",
        "positions",
        "llama with a cache",
        in_positions(lambda p, _: torch.arange(p.shape[-1]).expand_as(p)),
    ),
    Fault(
        "positions end where the trace did",
        "positions",
        "llama",
        in_positions(lambda p, _: p.clamp(max=TRACED_ROWS - 1)),
    ),
    Fault("row of batch 0 for all", "positions", "llama", in_tables(take_first_row)),
    Fault(
        "row of batch 0 for all, with a cache",
        "positions",
        "llama with a cache",
        in_tables(take_first_row),
    ),
    Fault(
        "positions scaled",
        "positions",
        "llama",
        in_frequencies(lambda f, size: f * size),
        _FINE,
    ),
    Fault("base scaled", "frequencies", "llama", in_frequencies(scale_base), _FINE),
    Fault("one frequency scaled", "frequencies", "llama", in_frequencies(scale_second), _FINER),
    Fault(
        "frequencies in bfloat16",
        "frequencies",
        "llama",
        in_frequencies(lambda f, _: f.bfloat16()),
    ),
    Fault(
        "frequencies one index late",
        "frequencies",
        "llama",
        in_frequencies(lambda f, _: f.roll(1)),
    ),
    Fault(
        "cos and sin in float16",
        "tables",
        "llama",
        in_tables(lambda c, s, _: (c.to(_HALF).to(c.dtype), s.to(_HALF).to(s.dtype))),
    ),
    Fault("sign of sin", "tables", "llama", in_tables(lambda c, s, _: (c, -s))),
    Fault("cos and sin exchanged", "tables", "llama", in_tables(lambda c, s, _: (s, c))),
    Fault(
        "cos and sin scaled", "tables", "llama", in_tables(lambda c, s, f: (c * f, s * f)), _FINE
    ),
    Fault(
        "attention factor left out",
        "tables",
        "yarn",
        in_attribute("attention_scaling", lambda *_: 1.0),
    ),
    Fault("last pair not rotated", "tables", "llama", in_tables(skip_last_pair)),
    Fault("partial rotary one pair short", "op", "phi", in_op(shorten)),
    Fault("pairs for halves", "op", "llama", in_layout("interleaved")),
    Fault("halves for pairs", "op", "cohere", in_layout("half")),
    Fault("query not rotated", "op", "llama", keep_slot(0)),
    Fault("key not rotated", "op", "llama", keep_slot(1)),
    Fault("scale of the key not inverted", "op", "xPos", use_query_scale),
    Fault("padding ignored", "mask", "llama", in_mask(torch.ones_like)),
    Fault(
        "padding of batch 0 for all",
        "mask",
        "llama",
        in_mask(lambda mask: mask[:1].expand_as(mask)),
    ),
    Fault("mask off by one: the next token is seen", "mask", "llama", in_attention(see_next)),
    Fault("window one position longer", "mask", "mistral", widen_window),
    Fault("scale of attention scaled", "attention", "llama", in_attention(scale_scores), _FINE),
    Fault(
        "query heads paired with the wrong keys",
        "attention",
        "llama",
        in_attention(pair_heads_wrongly, restore_heads),
    ),
    Fault("cache appended in front", "cache", "llama with a cache", append_in_front),
    Fault(
        "epsilon of the norms scaled",
        "layers",
        "llama",
        in_attribute("variance_epsilon", lambda eps, size: eps * size),
        _COARSE,
    ),
    Fault(
        "GELU by its approximation with tanh",
        "layers",
        "gpt_neox",
        in_modules(lambda module: type(module).__name__ == "GELUActivation", approximate_gelu),
    ),
    Fault("one weight matrix in bfloat16", "layers", "llama", round_weight),
]
