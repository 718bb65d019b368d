"""Stateless replacements for Hugging Face's rotary modules, for while a model is exported.

Their dynamic and longrope keep the frequencies of earlier calls, and branch on values that an
exporter would make constants. transformers is not imported: the module at hand has what is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.errors import RotaryExportError
from rotary_export.rope.config import read_rope
from rotary_export.rope.parameters import RopeParameters
from rotary_export.rope.scaled_embedding import ScaledRotaryEmbedding, compute_length
from rotary_export.rope.types.longrope import Longrope


class _View:
    """A module as its forward sees it, with some attributes replaced; the module is unchanged."""

    def __init__(self, module: nn.Module, replaced: dict[str, Any]) -> None:
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class StatelessRotary(nn.Module):
    """Runs a Hugging Face rotary module's own forward on frequencies that the graph selects.

    Args:
        module: The module; it is not changed.
        ropes: By type of layer, those that depend on the length.
    """

    def __init__(self, module: nn.Module, ropes: dict[str | None, RopeParameters]) -> None:
        super().__init__()
        self.module = module
        self.ropes = nn.ModuleDict(
            {_make_key(name): ScaledRotaryEmbedding(p) for name, p in ropes.items()}
        )
        # Without Hugging Face's decorators, which keep the state.
        self._forward: Any = inspect.unwrap(type(module).forward)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Return what a fresh module would."""
        options = {} if layer_type is None else {"layer_type": layer_type}
        replaced = {}
        key = _make_key(layer_type)
        if key in self.ropes:
            rope: Any = self.ropes[key]
            name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
            replaced[name] = rope.select_inv_freq(compute_length(position_ids))
        return self._forward(_View(self.module, replaced), x, position_ids, **options)


class TiledRotary(nn.Module):
    """Cos and sin, half-tiled, where a module's own forward can't be used (Phi-3.5-MoE).

    Args:
        parameters: From `read_rope`.
    """

    def __init__(self, parameters: RopeParameters) -> None:
        super().__init__()
        self.tables = ScaledRotaryEmbedding(parameters)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, (B, S, R), in x's dtype."""
        cos, sin = self.tables(position_ids)
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((sin, sin), dim=-1).to(x.dtype)


def _make_key(layer_type: str | None) -> str:
    return "all layers" if layer_type is None else layer_type


def is_stateful(module: nn.Module) -> bool:
    """Return whether a module is a Hugging Face rotary embedding that keeps a state."""
    rope_type = getattr(module, "rope_type", None)
    names = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    # As transformers' decorator `dynamic_rope_update` compares them.
    has_state = any(isinstance(n, str) and ("dynamic" in n or n == "longrope") for n in names)
    return has_state and hasattr(module, "config")


def replace_stateful(module: nn.Module) -> nn.Module | None:
    """Make a stateless replacement for a Hugging Face rotary module that keeps a state.

    It is called as the module is and returns what a fresh one would, at every length. It is
    compared with fresh modules on both sides of the `original_max_position_embeddings` boundary
    before it is returned.

    Args:
        module: Any module; it is not changed.

    Returns:
        The replacement; None where the module keeps no state.

    Raises:
        RotaryExportError: No replacement computes what the module does.
    """
    if not is_stateful(module):
        return None
    name = type(module).__name__
    ropes = read_rope(module.config)
    used = module.rope_type if isinstance(module.rope_type, dict) else ropes  # layers that it has
    length_dependent = {
        layer: p for layer, p in ropes.items() if layer in used and p and p.length_boundary
    }
    for candidate in _make_candidates(module, length_dependent):
        if all(_agrees(module, candidate, layer, p) for layer, p in length_dependent.items()):
            return candidate.to(next(module.buffers()).device)
    found = ", ".join(sorted({p.rope_type for p in length_dependent.values()}))
    raise RotaryExportError(
        f"{name} has a state, and its tables are not those of its config: rope types "
        f"{found or 'that depend on no length'}"
    )


def _make_candidates(
    module: nn.Module, ropes: dict[str | None, RopeParameters]
) -> Iterator[nn.Module]:
    parameters = ropes.get(None)
    if not isinstance(parameters, Longrope) or parameters.long_attention_factor is None:
        yield StatelessRotary(module, ropes)
        return
    yield TiledRotary(parameters)
    # transformers 5.23 ignores Phi-3.5-MoE's long factors.
    yield TiledRotary(replace(parameters, long_factor=parameters.short_factor))


def _agrees(
    module: nn.Module, candidate: nn.Module, layer_type: str | None, p: RopeParameters
) -> bool:
    """Compare with fresh modules, to the bit, at lengths on both sides of the boundary."""
    boundary = p.length_boundary
    assert boundary is not None
    options = {} if layer_type is None else {"layer_type": layer_type}
    rotary: Any = type(module)
    x = torch.zeros(1)
    for length in (1, boundary, boundary + 1, 2 * boundary):
        position_ids = torch.tensor([[0, length // 2, length - 1]])
        try:
            want = rotary(module.config)(x, position_ids, **options)
        except TypeError as error:
            raise RotaryExportError(
                f"{rotary.__name__} can't be made from its config, to compare with: {error}"
            ) from None
        got = candidate(x, position_ids, **options)
        wanted = want if isinstance(want, tuple) else (want,)
        found = got if isinstance(got, tuple) else (got,)
        if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
            return False
    return True
