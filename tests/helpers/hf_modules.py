"""transformers as the oracle: its configs and rotary modules, made without weights or network."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import warnings
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

logging.getLogger("transformers").setLevel(logging.ERROR)
ROPE_TYPES = {"default", *ROPE_INIT_FUNCTIONS}
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


@contextlib.contextmanager
def quiet() -> Any:
    """Ignore transformers' warnings about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_config(values: dict[str, Any]) -> Any:
    """Make a config object of a config.json's values."""
    with quiet():
        values = dict(values)
        return CONFIG_MAPPING[values.pop("model_type")](**values)


@functools.cache
def import_models(model_type: str) -> Any:
    """Return the modelling module of a family."""
    with quiet():
        name = CONFIG_MAPPING[model_type].__module__.replace("configuration_", "modeling_")
        return importlib.import_module(name)


def find_rotary_class(model_type: str, but: str = "Vision", strict: bool = False) -> Any:
    """Return a family's rotary module: the one whose annotation is the family's config.

    `but`: names that contain it are skipped, if it is not empty; `strict`: None if there is no such
    module, else the first one.
    """
    models = import_models(model_type)
    config = CONFIG_MAPPING[model_type]
    names = [n for n in vars(models) if n.endswith("RotaryEmbedding") and not (but and but in n)]
    for name in names:
        wanted = getattr(models, name).__init__.__annotations__.get("config")
        if wanted is config or wanted == config.__name__:
            return getattr(models, name)
    return None if strict else getattr(models, names[0])


def make_rotary(model_type: str, config: Any) -> Any:
    """Make a fresh rotary module."""
    with quiet():
        return find_rotary_class(model_type)(config)


def run_rotary(model_type: str, config: Any, position_ids: torch.Tensor, **options: Any) -> Any:
    """Return cos and sin of a fresh rotary module, in float32."""
    return make_rotary(model_type, config)(torch.zeros(1), position_ids, **options)
