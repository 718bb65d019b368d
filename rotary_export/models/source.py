"""Loads the model that a command names: a factory, a Hugging Face model, a config.json."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rotary_export.bundle.json_file import read_json
from rotary_export.compat.quiet import hide_progress_bars
from rotary_export.compat.transformers import has_causal_lm
from rotary_export.errors import RotaryExportError
from rotary_export.models.error_text import describe_error
from rotary_export.models.hub import fetch_model, is_hub_id


@dataclass(frozen=True)
class Source:
    """A model that was loaded.

    Attributes:
        model: The model.
        example_inputs: By argument name; None: they are to be made.
        note: A remark for the user, such as that the weights are random.
        folder: With its tokenizer; None: there is none.
    """

    model: nn.Module
    example_inputs: Mapping[str, Any] | None = None
    note: str = ""
    folder: Path | None = None


def load_source(source: str, revision: str | None = None) -> Source:
    """Load a model.

    Args:
        source: `package.module:factory`: a function without arguments that returns the model, or
            the model and its example inputs. The module is imported: **its code runs**. Or the
            folder of a Hugging Face model with safetensors weights, or its name on the hub,
            `org/name`, or a config.json (random weights); no code of these is run.
        revision: Of a model on the hub: a branch, a tag or a commit.

    Returns:
        The model, and example inputs if a factory returned them.

    Raises:
        RotaryExportError: It is none of these, or can't be loaded; the message is the reason.
    """
    path = Path(source)
    is_local = path.is_dir() or path.suffix == ".json" or ":" in source
    if not is_local and is_hub_id(source):
        folder = fetch_model(source, revision)
        return replace(_load_folder(folder), note=f"{source} at commit {folder.name}")
    if revision is not None:
        raise RotaryExportError(f"revision is for a model on the hub, org/name, got {source!r}")
    if path.is_dir():
        return _load_folder(path)
    if path.suffix == ".json":
        return _load_config(path)
    module, colon, name = source.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise RotaryExportError(
            "SOURCE must be package.module:factory, the folder of a Hugging Face model, its name "
            f"on the hub (org/name) or a config.json that exists, got {source!r}"
        )
    return _call_factory(source, module, name)


def _call_factory(source: str, module: str, name: str) -> Source:
    if os.getcwd() not in sys.path:  # as with `python -m`
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise RotaryExportError(
            f"{source}: {module} can't be imported: {describe_error(error)}"
        ) from error
    if not callable(factory):
        raise RotaryExportError(f"{source}: {module} has no function {name!r}")
    try:
        made = factory()
    except (Exception, SystemExit) as error:  # whatever the user's function raises
        raise RotaryExportError(f"{source}: {name}() raises {describe_error(error)}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (inputs is None or isinstance(inputs, Mapping)):
        raise RotaryExportError(
            f"{source}: {name}() must return a torch.nn.Module, or one and a dict of example "
            f"inputs, got {type(made).__name__}"
        )
    if inputs is None and not hasattr(model, "config"):
        raise RotaryExportError(
            f"{source}: {name}() must return example inputs too, as {type(model).__name__} is not "
            "a model of transformers"
        )
    return Source(model, inputs)


def _import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise RotaryExportError(
            f"this requires transformers: pip install transformers: {error}"
        ) from None


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise RotaryExportError(
            f"{path} is not a config of a Hugging Face model: it has no model_type"
        )
    return config


def _find_class(path: Path, config: Mapping[str, Any]) -> Any:
    """Return the model's class, from transformers itself."""
    transformers = _import_transformers()
    kind = config["model_type"]
    if kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        remote = " (it has code of its own, which is not run)" if "auto_map" in config else ""
        raise RotaryExportError(
            f"{path}: transformers {transformers.__version__} has no model_type {kind!r}{remote}"
        )
    for name in config.get("architectures") or []:
        if isinstance(name, str) and hasattr(transformers, name):
            return getattr(transformers, name)
    return None


def _load_folder(path: Path) -> Source:
    config = _read_config(path / "config.json")
    cls = _find_class(path, config) or _import_transformers().AutoModel
    _check_rope(path / "config.json", config)
    if not any(path.glob("*.safetensors")):
        raise RotaryExportError(
            f"{path} has no .safetensors file; weights of other formats are not read"
        )
    try:
        with hide_progress_bars(_import_transformers()):
            model = cls.from_pretrained(
                path,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype="auto",
            )
    except Exception as error:  # whatever transformers raises
        raise RotaryExportError(f"{path} can't be loaded: {describe_error(error)}") from error
    return Source(model, folder=path)


def _load_config(path: Path) -> Source:
    config = _read_config(path)
    transformers = _import_transformers()
    cls = _find_class(path, config)
    _check_rope(path, config)
    try:
        made = transformers.AutoConfig.for_model(**config)
        torch.manual_seed(0)
        if cls is not None:
            model = cls(made)
        else:
            known = has_causal_lm(transformers, made)
            auto = transformers.AutoModelForCausalLM if known else transformers.AutoModel
            model = auto.from_config(made, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises
        raise RotaryExportError(
            f"{path}: it does not describe a model: {describe_error(error)}"
        ) from error
    note = "the weights are random: there is only a config"
    return Source(model, note=note, folder=path.parent if path.name == "config.json" else None)


def _check_rope(path: Path, config: Mapping[str, Any]) -> None:
    """Check the rope type, its keys and its base: transformers' own errors are less clear."""
    from rotary_export.rope import read_rope
    from rotary_export.rope.families import BASE_KEYS
    from rotary_export.rope.fields import Fields

    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    try:
        Fields(text, "the config").number(*BASE_KEYS, default=1e4)
        if text.get("rope_scaling") or text.get("rope_parameters"):
            read_rope(dict(text))
    except RotaryExportError as error:
        raise RotaryExportError(f"{path}: {error}") from None
