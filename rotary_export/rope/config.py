"""Read the rotary embedding out of a Hugging Face config: a dict, an object, or a config.json.

Old configs (`rope_scaling` and `rope_theta`) and new ones (`rope_parameters`), one entry for all
layers or one for each type of layer. transformers is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from rotary_export.bundle.json_file import read_json_object
from rotary_export.errors import RotaryExportError
from rotary_export.rope import families
from rotary_export.rope.entries import read_entry, read_head_dim
from rotary_export.rope.fields import Fields
from rotary_export.rope.parameters import RopeParameters

HuggingFaceConfig: TypeAlias = Any  # a dict, an object with attributes, or a path


def load_config(config: HuggingFaceConfig) -> Any:
    """Return a config as a mapping or an object; of a multimodal config, its text model's.

    Args:
        config: A dict, an object with attributes, a config.json or its folder.

    Raises:
        RotaryExportError: The file is missing or not a JSON object.
    """
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        config = read_json_object(path / "config.json" if path.is_dir() else path)
    if isinstance(config, (type(None), bool, int, float, list, tuple, bytes)):
        raise RotaryExportError(
            f"config must be a dict, a config object or a path, got {type(config).__name__}"
        )
    inner = Fields(config, "the config").get("text_config")
    return config if inner is None or isinstance(inner, str) else inner


def read_rope(config: HuggingFaceConfig) -> dict[str | None, RopeParameters | None]:
    """Read the rotary embeddings of a Hugging Face config.

    Args:
        config: A dict, a config object (read through its attributes), or the path of a config.json.

    Returns:
        By type of layer; the key None stands for all layers, the value None for layers without a
        rotary embedding (NoPE).

    Raises:
        RotaryExportError: A rope type is unknown, a key is missing, a value is of the wrong type or
            impossible, or the config has no rotary embedding; the message names it.
    """
    config = load_config(config)
    fields = Fields(config, "the config")
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise fields.error("rope_parameters", "must be a dict", given)
    nested = {name for name, value in given.items() if isinstance(value, Mapping)}
    if nested or (given and all(value is None for value in given.values())):
        return {
            name: None if value is None else read_entry(config, name, value)
            for name, value in given.items()
            if value is None or name in nested
        }
    model_type = str(fields.get("model_type") or "")
    if model_type in families.OTHERS:
        raise RotaryExportError(
            f"the angles of model_type {model_type!r} are not those of its rope parameters, but "
            f"{families.OTHERS[model_type]}"
        )
    if model_type in families.TWO_BASES:
        return _read_two_bases(config, given, families.TWO_BASES[model_type])
    if not given and model_type in families.OWN_ROPES:
        raise RotaryExportError(
            f"rope_parameters is missing in the config, and model_type {model_type!r} has its own"
        )
    if not given and fields.get(*families.ROPE_KEYS) is None and not families.is_known(model_type):
        raise RotaryExportError(
            "the config has no rotary embedding: no rope_parameters, rope_scaling or rope_theta, "
            f"and model_type {model_type!r} is not known to have one"
        )
    return {None: read_entry(config, None, given)}


def _read_two_bases(
    config: Any, given: Mapping[str, Any], layers: tuple[tuple[str, str, float, bool], ...]
) -> dict[str | None, RopeParameters | None]:
    """Read an old config of a family with one base for each type of layer."""
    fields = Fields(config, "the config")
    entries: dict[str | None, RopeParameters | None] = {}
    for name, key, base, is_scaled in layers:
        own: dict[str, Any] = {"rope_theta": fields.number(key, default=base)}
        if name == "compress":  # DeepSeek-V4's yarn multiplies cos and sin by nothing
            own["attention_factor"] = 1.0
        entries[name] = read_entry(config, name, {**(given if is_scaled else {}), **own})
    return entries


def read_attention(
    config: HuggingFaceConfig, layer_type: str | None = None
) -> tuple[RopeParameters, dict[str, Any]]:
    """Read what an export of one rotary embedding requires.

    Args:
        config: As in `read_rope`.
        layer_type: Which rotary embedding, of a config that has several.

    Returns:
        The parameters, and num_heads, num_kv_heads, head_dim, and interleaved: None where the
        family's layout is not known.

    Raises:
        RotaryExportError: As `read_rope`; or `layer_type` is missing, not one of the config's, or
            of layers without a rotary embedding.
    """
    config = load_config(config)
    ropes = read_rope(config)
    names = [name for name in ropes if name is not None]
    if layer_type is None and len(ropes) == 1:
        (layer_type,) = ropes
    if layer_type not in ropes:
        expected = f"one of {', '.join(names)}" if names else "left out, the config has one rope"
        raise RotaryExportError(f"layer_type must be {expected}, got {layer_type!r}")
    parameters = ropes[layer_type]
    if parameters is None:
        raise RotaryExportError(f"layers of type {layer_type!r} have no rotary embedding (NoPE)")
    fields = Fields(families.find_layer_config(config, layer_type), "the config")
    model_type = str(fields.get("model_type") or "")
    if model_type in families.TWO_BLOCKS:
        raise RotaryExportError(
            f"{model_type} rotates each half of a head by itself, two calls of the "
            "op: rotary_export.rope has its tables"
        )
    num_heads = fields.count(*families.HEADS_KEYS)
    num_kv_heads = num_heads
    is_multi_query = fields.get("multi_query") and not fields.get("new_decoder_architecture")
    if is_multi_query or fields.get("qk_rope_head_dim") is not None:
        num_kv_heads = 1  # Falcon; latent attention has one rotary key, for all heads
    elif fields.get(*families.KV_HEADS_KEYS) is not None:
        num_kv_heads = fields.count(*families.KV_HEADS_KEYS)
    return parameters, {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": read_head_dim(fields),
        "interleaved": families.find_layout(model_type),
    }
