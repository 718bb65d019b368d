"""How much rounding alone moves a model's outputs: what its proof judges errors by.

Two correct programs of one model round differently: they sum in another order, fuse products, or
keep a wider type between two operations. Trained weights amplify that by orders of magnitude more
than random ones, so no fixed limit fits both. Here the model itself is the measure. It runs again,
and the output t of each of its modules becomes t (1 + r u), where u is the spacing of the type's
numbers at 1 and r is uniform in [-1/2, 1/2]: every module rounds once more, in a random direction.
The largest change of an output in a few such runs is its noise.

A module may hide what rounds inside: the angles of a timestep are in the thousands, and what their
rounding moves is more than half an ulp of a cosine. So before an error is final, every operator
rounds once more, in place of every module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rotary_export.compat import pytree
from rotary_export.compat.dispatch import DispatchMode, is_in_place
from rotary_export.proof.models.cases import Case, Run
from rotary_export.types import Array

RUNS = 3
_SLICE = 2**22  # elements that are perturbed at once
_LARGEST = float(np.finfo(np.float64).max)  # JSON has no infinity
Noise = dict[str, float]  # by output, the largest absolute change


class NoiseMeter:
    """Measures by how much rounding moves the outputs of one model.

    Args:
        model: Perturbed for a while, then as before.
        run: Runs it on its tensors, in order, as if it were the first run.
    """

    def __init__(self, model: nn.Module, run: Run) -> None:
        self._model = model
        self._run = run
        self._spacings: Mapping[nn.Module, float] | None = None

    def measure(
        self,
        case: Case,
        eager: Mapping[str, Array],
        runs: int = RUNS,
        *,
        every_operator: bool = False,
    ) -> Noise:
        """Return, by floating-point output, the largest absolute change that is not padding.

        Args:
            case: What to run the model on.
            eager: What it returns for that.
            runs: How often it is perturbed.
            every_operator: Perturb the results of operators, not those of modules.
        """
        if self._spacings is None:
            with _record_types(self._model) as types:
                self._run(case.tensors)
            self._spacings = types.spacings
        generator = torch.Generator().manual_seed(case.spec.seed if case.spec else 0)

        def perturb() -> AbstractContextManager[Any]:
            if every_operator:
                return _PerturbOperators(generator)
            return _perturb(self._model, self._spacings or {}, generator)

        floating = {n: v for n, v in eager.items() if np.issubdtype(v.dtype, np.floating)}
        noise = dict.fromkeys(floating, 0.0)
        for _ in range(runs):
            with perturb():
                outputs = case.read_outputs(self._run(case.tensors))
            for name, want in floating.items():
                if outputs[name].shape != want.shape:  # it depends on values
                    continue
                with np.errstate(invalid="ignore"):  # infinity less infinity
                    change = case.select(np.abs(np.float64(outputs[name]) - want))
                noise[name] = max(noise[name], float(np.nanmax(change, initial=0.0)))
        return {name: min(change, _LARGEST) for name, change in noise.items()}


def _move(leaf: Any, generator: torch.Generator, spacing: float = 0.0) -> Any:
    """Round a floating-point tensor once more; numbers near the end of its range stay."""
    if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
        return leaf
    spacing = max(spacing, torch.finfo(leaf.dtype).eps)  # of a module that has not run yet
    wide = torch.float64 if leaf.dtype == torch.float64 else torch.float32
    result = torch.empty_like(leaf, memory_format=torch.contiguous_format)
    pairs = zip(leaf.reshape(-1).split(_SLICE), result.view(-1).split(_SLICE), strict=True)
    for part, into in pairs:  # logits of long sequences are larger than the weights of a model
        change = torch.rand(part.shape, generator=generator, dtype=wide).sub_(0.5).mul_(spacing)
        moved = change.mul_(part).add_(part).to(leaf.dtype)
        torch.where(moved.isfinite(), moved, part, out=into)
    return result


class _PerturbOperators(DispatchMode):
    """Rounds once more what every operator computes, but for those that only move numbers."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = generator

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        given = any(isinstance(leaf, Tensor) for leaf in pytree.list_leaves(args))
        exact = function.overloadpacket in _EXACT or function.is_view
        if not given or exact or is_in_place(function):
            return output
        return pytree.map_leaves(lambda leaf: _move(leaf, self._generator), output)


@contextmanager
def _perturb(
    model: nn.Module, spacings: Mapping[nn.Module, float], generator: torch.Generator
) -> Iterator[None]:
    """Round the output of every module once more, while the context lasts."""

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        spacing = spacings.get(module, 0.0)
        return pytree.map_leaves(lambda leaf: _move(leaf, generator, spacing), output)

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Types(DispatchMode):
    """Keeps by module the spacing at 1 of the narrowest type that its operators compute in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running: list[nn.Module] = []
        self.spacings: dict[nn.Module, float] = {}

    def note(self, module: nn.Module, value: Any) -> None:
        for leaf in pytree.list_leaves(value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                spacing = torch.finfo(leaf.dtype).eps
                self.spacings[module] = max(self.spacings.get(module, 0.0), spacing)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        moves = function in _MOVES or function.is_view
        if self.running and not moves and any(isinstance(a, Tensor) for a in args):
            self.note(self.running[-1], output)
        return output


_EXACT = {
    getattr(torch.ops.aten, name)
    for name in (
        "_to_copy cat clone constant_pad_nd copy embedding flip gather index index_select "
        "masked_fill maximum minimum neg repeat roll scatter slice_scatter stack where"
    ).split()
}
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)  # they compute nothing


@contextmanager
def _record_types(model: nn.Module) -> Iterator[_Types]:
    """Record the narrowest type that each module computes in or returns."""
    types = _Types()

    def enter(module: nn.Module, _: Any) -> None:
        types.running.append(module)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        types.running.pop()
        types.note(module, output)

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        with types:
            yield types
    finally:
        for handle in handles:
            handle.remove()
