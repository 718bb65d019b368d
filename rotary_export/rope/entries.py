"""Read one entry of a config's rope parameters: the rope type and what it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rotary_export.errors import RotaryExportError
from rotary_export.rope import families
from rotary_export.rope.fields import Fields
from rotary_export.rope.frequencies import (
    ROPE_TYPES,
    RopeParameters,
    compute_inv_freq,
    compute_mscale,
    find_axes,
)

_ALIASES = {"su": "longrope", "mrope": "default", "xdrope": "dynamic"}
_REQUIRED = {
    "linear": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def read_entry(config: Any, layer_type: str | None, entry: Mapping[str, Any]) -> RopeParameters:
    """Read one rotary embedding, from its own keys first, then from the config's.

    Args:
        config: A dict or an object.
        layer_type: None: of all layers.
        entry: What `rope_parameters` says of it.

    Returns:
        The parameters.

    Raises:
        RotaryExportError: As `read_rope`.
    """
    where = "the config" if layer_type is None else f"the config for layers {layer_type!r}"
    top = Fields(families.find_layer_config(config, layer_type), "the config")
    own = Fields(entry, f"the rope parameters of {where}")
    model_type = str(top.get("model_type") or "")
    known = families.DEFAULTS.get(model_type, {})
    rope_type = _read_type(own, model_type)
    for key in _REQUIRED.get(rope_type, ()):
        if own.get(key) is None:
            raise RotaryExportError(f"rope type {rope_type!r} needs {key}, which {where} has not")

    source = top if own.get("rope_theta") is None else own
    base = source.number(*families.BASE_KEYS, default=known.get("rope_theta", 10000.0))
    if base <= 1:
        raise source.error("rope_theta", "must be > 1", base)
    thetas = top.get("layer_rope_theta")
    if isinstance(thetas, list) and any(theta and theta != base for theta in thetas):
        raise top.error("layer_rope_theta", f"must be 0 or rope_theta = {base:g}", thetas)
    head_dim = read_head_dim(top)
    partial = _read_partial(own, top, head_dim, known)
    parameters = RopeParameters(
        rope_type=rope_type,
        base=base,
        head_dim=head_dim,
        dim=_find_dim(own, rope_type, head_dim, partial, families.AXIAL.get(model_type, "")),
        max_position_embeddings=_read_length(top),
        rotated_pairs=int(partial * head_dim // 2) if rope_type == "proportional" else 0,
        coordinates=model_type in families.COORDINATES,
    )
    parameters = _READERS.get(rope_type, _keep)(parameters, own, top)
    parameters = _read_mrope(parameters, own, model_type)
    if not compute_inv_freq(parameters).isfinite().all():
        raise own.error("factor", "must leave every frequency finite", parameters.factor)
    return parameters


def _read_type(own: Fields, model_type: str) -> str:
    """Read the rope type, under its name of today."""
    name = own.get("rope_type", "type") or "default"
    if model_type in families.LONGROPE_ONLY and name == "yarn":
        name = "longrope"
    found = _ALIASES.get(name, name) if isinstance(name, str) else name
    if model_type in families.AXIAL and found == "default":
        found = "axial"
    if found not in ROPE_TYPES:
        raise own.error("rope_type", f"must be one of {', '.join(ROPE_TYPES)}", name)
    if found == "axial" and model_type and model_type not in families.AXIAL:
        raise own.error("rope_type", f"'axial' of model_type {model_type!r} is not known", name)
    return str(found)


def read_head_dim(top: Fields) -> int:
    """Read H: with latent attention, of the part of a head that is rotated."""
    if top.get("memory_attention_hidden_size") is not None:  # SAM 2: of the memory attention
        rate = top.count("memory_attention_downsample_rate")
        heads = rate * top.count("memory_attention_num_attention_heads")
        head_dim = top.count("memory_attention_hidden_size") // heads
    elif top.get(*families.HEAD_DIM_KEYS) is not None:
        head_dim = top.count(*families.HEAD_DIM_KEYS)
    else:
        head_dim = top.count(*families.HIDDEN_KEYS) // top.count(*families.HEADS_KEYS)
    if not 2 <= head_dim <= 2**16:
        raise top.error("head_dim", "must be >= 2 and <= 65536", head_dim)
    return head_dim


def _read_partial(own: Fields, top: Fields, head_dim: int, known: Mapping[str, float]) -> float:
    """Read which share of a head is rotated."""
    if own.get("partial_rotary_factor") is not None:
        return own.number("partial_rotary_factor")
    names = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
    if top.get(*names) is None and top.get("rotary_dim") is not None:
        return top.count("rotary_dim") / head_dim
    rotary_dim = known.get("rotary_dim", head_dim)
    if top.get("qk_rope_head_dim") is not None:
        rotary_dim = top.count("qk_rope_head_dim")
    default = known.get("partial_rotary_factor", rotary_dim / head_dim)
    return top.number(*names, default=default)


def _find_dim(own: Fields, rope_type: str, head_dim: int, partial: float, layout: str) -> int:
    """Return what the exponents are divided by."""
    if rope_type == "axial":
        if layout == "three-axes" and head_dim >= 6:  # the rest of a head stays as it is
            return head_dim // 3 // 2 * 2
        if head_dim % 4:
            raise own.error("head_dim", "must be a multiple of 4 for rope type axial", head_dim)
        return head_dim if layout == "even-odd" else head_dim // 2
    dim = head_dim if rope_type == "proportional" else int(head_dim * partial)
    if partial > 1 or dim + dim % 2 > head_dim:
        raise own.error("partial_rotary_factor", f"must fit head_dim={head_dim}", partial)
    if dim < 2 or (dim % 2 and rope_type in ("yarn", "longrope", "proportional")):
        raise own.error(
            "partial_rotary_factor",
            f"times head_dim={head_dim} must be at least 2, and even for {rope_type}",
            partial,
        )
    return dim


def _read_length(top: Fields) -> int:
    if top.get(*families.LENGTH_KEYS) is None:
        return 0
    return top.count(*families.LENGTH_KEYS)


def _read_original_length(own: Fields, top: Fields) -> int:
    """Read how many positions there were before the model was made longer."""
    name = "original_max_position_embeddings"
    if top.get(name) is not None:
        return top.count(name)
    if own.get(name) is not None:
        return own.count(name)
    return top.count(*families.LENGTH_KEYS)


def _read_ratio(own: Fields, top: Fields, original: int) -> float:
    """Read factor; without one it is the ratio of the lengths."""
    if own.get("factor") is not None:
        return own.number("factor")
    return top.count(*families.LENGTH_KEYS) / original


def _keep(p: RopeParameters, own: Fields, top: Fields) -> RopeParameters:
    return p


def _read_factor(p: RopeParameters, own: Fields, top: Fields) -> RopeParameters:
    """Linear and proportional."""
    return replace(p, factor=own.number("factor", default=1.0))


def _read_dynamic(p: RopeParameters, own: Fields, top: Fields) -> RopeParameters:
    if p.dim <= 2:
        raise own.error("partial_rotary_factor", "must leave a rotary_dim > 2 for dynamic", p.dim)
    if own.get("alpha"):  # HunYuan: fixed, so of the default type
        alpha = own.number("alpha")
        return replace(p, rope_type="default", base=p.base * alpha ** (p.dim / (p.dim - 2)))
    length = top.count(*families.LENGTH_KEYS)
    return replace(p, factor=own.number("factor"), max_position_embeddings=length)


def _read_yarn(p: RopeParameters, own: Fields, top: Fields) -> RopeParameters:
    name = "original_max_position_embeddings"
    if own.get("factor") is None and own.get(name) is None and top.get(name) is None:
        raise RotaryExportError(f"rope type 'yarn' needs factor or {name}, the config has neither")
    original = _read_original_length(own, top)
    factor = _read_ratio(own, top, original)
    mscale, all_dim = (
        own.number(name, default=1.0) if own.get(name) else 0.0
        for name in ("mscale", "mscale_all_dim")
    )
    attention = compute_mscale(factor)
    if mscale and all_dim:
        attention = compute_mscale(factor, mscale) / compute_mscale(factor, all_dim)
    truncate = own.get("truncate")
    if truncate not in (None, True, False):
        raise own.error("truncate", "must be true or false", truncate)
    return replace(
        p,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=own.number("attention_factor", default=attention),
        softmax_factor=compute_mscale(factor, all_dim) ** 2 if all_dim else 1.0,
        beta_fast=own.number("beta_fast", default=32.0),
        beta_slow=own.number("beta_slow", default=1.0),
        truncate=truncate is not False,
    )


def _read_longrope(p: RopeParameters, own: Fields, top: Fields) -> RopeParameters:
    original = _read_original_length(own, top)
    if original < 2:
        raise own.error("original_max_position_embeddings", "must be >= 2", original)
    factor = _read_ratio(own, top, original)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    p = replace(
        p,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=own.number("attention_factor", default=attention),
        short_factor=own.numbers("short_factor", p.dim // 2),
        long_factor=own.numbers("long_factor", p.dim // 2),
    )
    if own.get("short_mscale") is not None or own.get("long_mscale") is not None:  # Phi-3.5-MoE
        short, long = own.number("short_mscale"), own.number("long_mscale")
        p = replace(p, attention_factor=short, long_attention_factor=long)
    return p


def _read_llama3(p: RopeParameters, own: Fields, top: Fields) -> RopeParameters:
    low, high = own.number("low_freq_factor"), own.number("high_freq_factor")
    if high <= low:
        raise own.error("high_freq_factor", f"must be > low_freq_factor = {low:g}", high)
    return replace(
        p,
        factor=own.number("factor"),
        original_max_position_embeddings=_read_original_length(own, top),
        low_freq_factor=low,
        high_freq_factor=high,
    )


_READERS = {
    "linear": _read_factor,
    "proportional": _read_factor,
    "dynamic": _read_dynamic,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
    "llama3": _read_llama3,
}


def _is_count(value: Any) -> bool:
    """Return whether a section has a size: an int, or as some checkpoints write it, 16.0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value < 2**31 and value == int(value)


def _read_mrope(p: RopeParameters, own: Fields, model_type: str) -> RopeParameters:
    """Read the sections of multimodal positions, and how the family deals them out."""
    layout, section = families.MROPE.get(model_type, ("", ()))
    given = own.get("mrope_section", "xdrope_section")
    if given is not None:
        is_list = isinstance(given, (list, tuple)) and len(given) > 1
        if not is_list or not all(_is_count(n) for n in given):
            raise own.error("mrope_section", "must be a list of ints >= 0", given)
        if layout == "doubled":
            what = f"of {model_type} gives the two channels of a pair different axes: no rotation"
            raise own.error("mrope_section", what, given)
        section = tuple(int(n) for n in given)
        layout = layout or ("interleaved" if own.get("mrope_interleaved") else "chunked")
    if p.rope_type == "axial":
        return replace(p, mrope_layout=families.AXIAL.get(model_type, ""))
    p = replace(p, mrope_section=tuple(section), mrope_layout=layout if section else "")
    find_axes(p)
    return p
