"""`rope/families.py`, compared with the installed transformers."""

from __future__ import annotations

import pytest
import torch
from helpers.hf_modules import (
    CONFIG_MAPPING,
    find_rotary_class,
    import_models,
    make_config,
    make_rotary,
    quiet,
)
from helpers.oracles import assert_same_bits

from rotary_export.errors import RotaryExportError
from rotary_export.rope import ScaledRotaryEmbedding, families, read_rope
from rotary_export.rope.config import read_attention

KNOWN = sorted(families.HALF | families.INTERLEAVED)
# Families without a module of their own: fixed tables, or angles inside the attention.
NO_MODULE = {"codegen", "gptj", "roformer", "esm", "persimmon"}
IDS = torch.tensor([[0, 1, 2, 77, 5000, 131071], [3, 9, 31, 4095, 4096, 4097]])


def make_default(model_type):
    with quiet():
        return CONFIG_MAPPING[model_type]()


@pytest.mark.parametrize("model_type", KNOWN)
def test_family_is_in_transformers(model_type):
    assert model_type in CONFIG_MAPPING


@pytest.mark.parametrize("model_type", [name for name in KNOWN if name not in NO_MODULE])
def test_tables_of_a_default_config(model_type):
    """Cos and sin of the family's own module, from the object and from its dict."""
    config = make_default(model_type)
    ropes = read_rope(config)
    assert read_rope(config.to_dict()) == ropes
    interleaved = families.find_layout(model_type)
    module = make_rotary(model_type, config)
    for layer_type, parameters in ropes.items():
        if layer_type is not None and layer_type not in config.layer_types:
            continue
        rope = ScaledRotaryEmbedding(parameters)
        options = {} if layer_type is None else {"layer_type": layer_type}
        want = module(torch.zeros(1), IDS, **options)
        if isinstance(want, torch.Tensor):  # complex: torch.polar's cos and sin differ by an ulp
            for got, part in zip(rope(IDS), (want.real, want.imag), strict=True):
                torch.testing.assert_close(got, part, rtol=0, atol=1.2e-7)
            continue
        for got, full in zip(rope(IDS), want, strict=True):
            width = full.shape[-1]
            if width == 2 * got.shape[-1]:
                full = full[..., ::2] if is_repeated(full) else full[..., : width // 2]
            assert_same_bits(got, full.contiguous(), layer_type)
    assert interleaved is not None


def is_repeated(table):
    """Return whether each column stands twice in a row, not the halves."""
    return torch.equal(table[..., ::2], table[..., 1::2])


def find_rotate(model_type):
    models = import_models(model_type)
    for name in ("rotate_half_text", "rotate_half_llm", "rotate_half", "rotate_every_two"):
        if hasattr(models, name):
            return getattr(models, name)
    return None


@pytest.mark.parametrize("model_type", KNOWN)
def test_layout(model_type):
    """Which channel is turned into the first: the next one, or the one half a head on."""
    rotate = find_rotate(model_type)
    if rotate is None:
        assert model_type in {"gpt_oss", "deepseek_v2", "llama4_text", "roformer"}
        return
    first = float(rotate(torch.arange(8.0).expand(1, 1, 1, 8)).flatten()[0])
    assert first == (-1.0 if model_type in families.INTERLEAVED else -4.0)


@pytest.mark.parametrize("model_type", KNOWN)
def test_defaults(model_type):
    """A config.json that leaves base and share out."""
    values = make_default(model_type).to_dict()
    ropes = values.get("rope_parameters") or {}
    if model_type in families.TWO_BASES or any(isinstance(v, dict) for v in ropes.values()):
        return
    bare = {k: v for k, v in values.items() if not k.startswith(("rope_", "partial_", "rotary_"))}
    if model_type in families.OWN_ROPES:
        with pytest.raises(RotaryExportError, match="rope_parameters is missing"):
            read_rope(bare)
        return
    assert read_rope(bare) == read_rope(make_config(bare))


PARTIAL = {
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
# Where transformers' own defaults don't go with its sections.
MROPE_CONFIGS = {
    "cohere_compass_text": {
        "head_dim": 128,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "glm4v_moe_text": PARTIAL,
    "glm4v_text": PARTIAL,
    "qwen3_omni_moe_text": {"head_dim": 128},
}


@pytest.mark.parametrize("model_type", families.MROPE)
def test_mrope_of_a_family(model_type):
    """Positions of three axes, with the sections that configs leave out."""
    if families.MROPE[model_type][0] == "doubled":
        rope = {"mrope_section": [16, 16, 16, 16]}
        with pytest.raises(
            RotaryExportError, match=f"mrope_section of {model_type} assigns different axes to"
        ):
            read_rope({"model_type": model_type, "head_dim": 128, "rope_parameters": rope})
        return
    config = make_config({"model_type": model_type, **MROPE_CONFIGS.get(model_type, {})})
    ids = torch.stack((IDS, IDS.flip(1), IDS // 3))
    module = make_rotary(model_type, config)
    for layer_type, parameters in read_rope(config).items():
        options = {} if layer_type is None else {"layer_type": layer_type}
        want = module(torch.zeros(1), ids, **options)
        for got, full in zip(ScaledRotaryEmbedding(parameters)(ids), want, strict=True):
            full = full[..., ::2] if is_repeated(full) else full[..., : full.shape[-1] // 2]
            assert_same_bits(got, full.contiguous(), layer_type)


def find_vision_class(model_type):
    models, config = import_models(model_type), CONFIG_MAPPING[model_type]
    for name in vars(models):
        wanted = getattr(getattr(models, name), "__init__", None)
        wanted = getattr(wanted, "__annotations__", {}).get("config")
        if name.endswith(("RotaryEmbedding", "RoPE")) and wanted in (config, config.__name__):
            return getattr(models, name)
    raise AssertionError(model_type)


NOT_OF_IDS = families.COORDINATES | {"llama4_vision_model"}  # have a test of their own


@pytest.mark.parametrize("model_type", sorted(set(families.AXIAL) - NOT_OF_IDS))
def test_axial_vision(model_type):
    """Cos and sin of the family's own module, at any rows and columns, to the bit."""
    config = make_default(model_type)
    parameters = read_rope(config)[None]
    assert read_rope(config.to_dict())[None] == parameters
    rope = ScaledRotaryEmbedding(parameters)
    positions = torch.randint(0, 90, (rope.num_axes, 1, 50))
    theirs = positions[:, 0].T
    if model_type == "gemma4_vision":
        theirs = theirs[None]
    with quiet():
        tables = find_vision_class(model_type)(config)(torch.zeros(1), theirs)
    half, seen = rope.dim // 2, set()
    for got, full in zip(rope(positions), tables, strict=True):
        full = full.reshape(50, -1)
        assert full.shape[1] == rope.dim
        if model_type in families.TWO_BLOCKS:  # h, h, w, w
            full = full.reshape(50, 4, -1)[:, [0, 2, 1, 3]].reshape(50, -1)
        layouts = {"interleaved": (full[:, ::2], full[:, 1::2]), "half": full.split(half, 1)}
        fits = [n for n, (a, b) in layouts.items() if torch.equal(a, b)]
        assert len(fits) == 1
        seen.add(fits[0])
        assert_same_bits(got[0], layouts[fits[0]][0].contiguous())
    assert len(seen) == 1


def test_coordinates_of_dinov3():
    """Positions in [-1, 1], of an image of any size."""
    models = import_models("dinov3_vit")
    for width in (64, 48, 20):
        values = {"model_type": "dinov3_vit", "hidden_size": 2 * width, "num_attention_heads": 2}
        config = make_config(values)
        rope = ScaledRotaryEmbedding(read_rope(config)[None])
        module = models.DINOv3ViTRopePositionEmbedding(config).eval()
        cos, sin = module(torch.zeros(1, 3, 5 * 16, 7 * 16))
        made = models.get_patches_center_coordinates(5, 7, dtype=torch.float32, device="cpu")
        for got, want in zip(rope(made.T[:, None]), (cos, sin), strict=True):
            assert_same_bits(got[0], want[:, : width // 2].contiguous())


def test_grid_of_llama4():
    """Rows and columns count from 1; the class token, last, has 0 and 0."""
    values = {"image_size": 70, "patch_size": 14, "hidden_size": 96, "num_attention_heads": 2}
    config = make_config({"model_type": "llama4_vision_model", **values})
    rope = ScaledRotaryEmbedding(read_rope(config)[None])
    want = import_models("llama4_vision_model").Llama4VisionRotaryEmbedding(config)(torch.zeros(1))
    rows, columns = torch.arange(25) // 5 + 1, torch.arange(25) % 5 + 1
    ids = torch.stack((rows, columns))
    ids = torch.cat((ids, torch.zeros(2, 1, dtype=torch.int64)), dim=1)
    for got, part in zip(rope(ids[:, None]), (want.real, want.imag), strict=True):
        assert_same_bits(got[0], part[:, 0].contiguous())


def test_two_rotations_have_no_bundle():
    config = {"model_type": "gemma4_vision", "head_dim": 16, "num_attention_heads": 2}
    with pytest.raises(RotaryExportError, match="gemma4_vision rotates each half of a head"):
        read_attention(config)


@pytest.mark.parametrize("model_type", families.OTHERS)
def test_other_angles_are_refused(model_type):
    with pytest.raises(RotaryExportError, match=f"the angles of model_type {model_type!r} are not"):
        read_rope({"model_type": model_type, "rope_theta": 1e4, "head_dim": 64})


# What their default configs can't be read for: their sections.
UNREAD = frozenset({"glm4v_moe_text", "glm4v_text", "qwen3_omni_moe_text"})


def test_every_family():
    """Frequencies and attention factor of every rotary module of transformers, to the bit."""
    agreed, left = set(), {}
    for model_type in sorted(CONFIG_MAPPING):
        try:
            config = make_default(model_type)
            module = find_rotary_class(model_type, "Vision", strict=True)(config)
        except Exception as error:  # no such module, or not of this config
            left[model_type] = type(error).__name__
            continue
        if getattr(config, "text_config", None) is not None:  # its own module is not for text
            continue
        if model_type in UNREAD.union(families.OTHERS):
            with pytest.raises(RotaryExportError):
                read_rope(config)
            continue
        for layer_type, parameters in read_rope(config).items():
            prefix = "" if layer_type is None else f"{layer_type}_"
            want = getattr(module, f"{prefix}inv_freq", None)
            if parameters is None or want is None:
                continue
            if model_type != "ernie4_5_vl_moe_text":  # whose columns stand in another order
                got = parameters.compute_inv_freq()[: len(want)]
                assert_same_bits(got, want, (model_type, layer_type))
            scaling = getattr(module, f"{prefix}attention_scaling", 1.0)
            assert parameters.compute_attention_factor() == scaling, model_type
            agreed.add(model_type)
    assert len(agreed) >= 140, (len(agreed), left)


def test_two_lists_are_apart():
    assert not families.HALF & families.INTERLEAVED
    assert families.find_layout("llama") is False
    assert families.find_layout("gptj") is True
    assert families.find_layout("deepseek_v3") is None
