"""Read one entry of a config's rope parameters: the fields that every rope type has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rotary_export.errors import RotaryExportError
from rotary_export.rope import families
from rotary_export.rope.fields import Entry, Fields
from rotary_export.rope.parameters import RopeParameters
from rotary_export.rope.rope_types import ALIASES, ROPE_TYPES


def read_entry(config: Any, layer_type: str | None, values: Mapping[str, Any]) -> RopeParameters:
    """Read one rotary embedding, from its own keys first, then from the config's.

    Args:
        config: A dict or an object.
        layer_type: None: of all layers.
        values: The entry of `rope_parameters`.

    Returns:
        The parameters.

    Raises:
        RotaryExportError: As `read_rope`.
    """
    where = "the config" if layer_type is None else f"the config for layers {layer_type!r}"
    top = Fields(families.find_layer_config(config, layer_type), "the config")
    own = Fields(values, f"the rope parameters of {where}")
    model_type = str(top.get("model_type") or "")
    known = families.DEFAULTS.get(model_type, {})
    rope_type = _find_type(own, model_type)
    for key in rope_type.required_keys:
        if own.get(key) is None:
            raise RotaryExportError(
                f"rope type {rope_type.rope_type!r} needs {key}, which {where} has not"
            )

    source = top if own.get("rope_theta") is None else own
    base = source.number(*families.BASE_KEYS, default=known.get("rope_theta", 10000.0))
    if base <= 1:
        raise source.error("rope_theta", "must be > 1", base)
    thetas = top.get("layer_rope_theta")
    if isinstance(thetas, list) and any(theta and theta != base for theta in thetas):
        raise top.error("layer_rope_theta", f"must be 0 or rope_theta = {base:g}", thetas)
    head_dim = read_head_dim(top)
    share = _read_share(own, top, head_dim, known)
    entry = Entry(own, top, model_type, head_dim, share)
    parameters = rope_type.read(
        entry,
        base=base,
        head_dim=head_dim,
        dim=rope_type.find_dim(entry),
        max_position_embeddings=_read_length(top),
    )
    parameters = _read_sections(parameters, own, model_type)
    if not parameters.compute_inv_freq().isfinite().all():
        raise own.error("factor", "must leave every frequency finite", own.get("factor"))
    return parameters


def _find_type(own: Fields, model_type: str) -> type[RopeParameters]:
    """Find the rope type, by its name or one of its aliases."""
    name = own.get("rope_type", "type") or "default"
    if model_type in families.LONGROPE_ONLY and name == "yarn":
        name = "longrope"
    found = ALIASES.get(name, name) if isinstance(name, str) else None
    if model_type in families.AXIAL and found == "default":
        found = "axial"
    if found not in ROPE_TYPES:
        raise own.error("rope_type", f"must be one of {', '.join(ROPE_TYPES)}", name)
    return ROPE_TYPES[found]


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


def _read_share(own: Fields, top: Fields, head_dim: int, known: Mapping[str, float]) -> float:
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


def _read_length(top: Fields) -> int:
    if top.get(*families.LENGTH_KEYS) is None:
        return 0
    return top.count(*families.LENGTH_KEYS)


def _is_count(value: Any) -> bool:
    """Return whether a section has a size: an int, or as some checkpoints write it, 16.0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value < 2**31 and value == int(value)


def _read_sections(p: RopeParameters, own: Fields, model_type: str) -> RopeParameters:
    """Read the sections of multimodal positions, and how the family assigns columns to them."""
    layout, section = families.MROPE.get(model_type, ("", ()))
    given = own.get("mrope_section", "xdrope_section")
    if given is not None:
        is_list = isinstance(given, (list, tuple)) and len(given) > 1
        if not is_list or not all(_is_count(n) for n in given):
            raise own.error("mrope_section", "must be a list of ints >= 0", given)
        if layout == "doubled":
            what = (
                f"of {model_type} assigns different axes to the channels of a pair: not a rotation"
            )
            raise own.error("mrope_section", what, given)
        section = tuple(int(n) for n in given)
        layout = layout or ("interleaved" if own.get("mrope_interleaved") else "chunked")
    if p.axis_layout:  # an image's axes
        return p
    p = replace(p, mrope_section=tuple(section), axis_layout=layout if section else "")
    p.find_axes()
    return p
