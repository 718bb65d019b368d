"""What a model of a library is, for `libraries.py`: how to make it, its inputs, its open sizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# A table, a layer scale or a zero-initialised projection: nothing would pass through it.
ZERO = 1e-3


class Case(ABC):
    """One model: a real class of a library, with a tiny configuration and random weights.

    Attributes:
        name: What the table and `--only` call it.
        library: The distribution that contains the class.
        sizes: Arguments of `inputs`; the first are traced, the others are not.
        dims: `dynamic_shapes` of `export_model`.
    """

    name: ClassVar[str]
    library: ClassVar[str]
    sizes: ClassVar[tuple[tuple[int, ...], ...]] = ((2, 6), (3, 11), (1, 40))
    dims: ClassVar[str | Mapping[str, Mapping[int, Any]]] = "auto"

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the model, with the library's own initialisation."""

    @abstractmethod
    def inputs(self, *sizes: int) -> dict[str, Any]:
        """Make keyword arguments of the model's forward."""

    def make_model(self) -> nn.Module:
        """Make the model, with weights by which its output depends on positions."""
        torch.manual_seed(0)
        model = self.build().eval().float()
        randomize(model)
        return model

    def make_inputs(self, index: int) -> dict[str, Any]:
        """Make the inputs of one of `sizes`, the same at each call."""
        torch.manual_seed(index + 1)
        return self.inputs(*self.sizes[index])


def randomize(model: nn.Module) -> None:
    """Give a model weights that keep magnitudes, so that attention is neither flat nor one-hot.

    The usual initialisation (0.02) makes all scores near zero, so that any rotation would do.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "freq" in name or not parameter.is_floating_point():
                continue
            if parameter.ndim > 1 and "embed" in name and parameter.ndim == 2:
                nn.init.normal_(parameter)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=(parameter[0].numel()) ** -0.5)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.abs().max() < ZERO:
                nn.init.normal_(parameter, mean=1.0, std=0.1)


def make_features(*shape: int) -> Tensor:
    """Return random features, of variance 1."""
    return torch.randn(*shape)


def make_tokens(batch: int, length: int, vocabulary: int = 90) -> Tensor:
    """Return random ids, no special ones among them."""
    return torch.randint(5, vocabulary, (batch, length))
