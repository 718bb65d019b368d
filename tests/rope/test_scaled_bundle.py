"""Bundles of every rope type: exported, proven on both sides of the length boundary, loaded."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
import torch
from click.testing import CliRunner
from helpers.bundles import EXACT_PATHS, PATHS, check_refused
from helpers.hf_modules import ROPE_TYPES as HF_ROPE_TYPES
from helpers.hf_modules import make_config, run_rotary
from helpers.oracles import assert_same_bits, rotate_eagerly
from helpers.rope_cases import BOUNDARY, BUNDLES, HALF, compute_theta
from helpers.scaled_bundles import (
    LENGTH_DEPENDENT,
    ROWS,
    WHOLE,
    make_inputs,
    make_rope,
    make_values,
)

import rotary_export
from rotary_export.cli.main import cli
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.rope import ScaledRotaryEmbedding, read_rope


@pytest.fixture(scope="module")
def get_bundle(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def get(name):
        if name not in made:
            made[name] = rotary_export.export(
                make_rope(name),
                folder / name,
                max_seq_len=ROWS,
                num_heads=4,
                num_kv_heads=2,
                formats=("onnx", "torchscript", "program") if name in WHOLE else ("onnx",),
            )
        return made[name]

    return get


def run_theirs(name, inputs):
    """Rotate with a fresh Hugging Face module's tables."""
    values = make_values(name)
    model_type = "llama"
    if "mrope_section" in BUNDLES[name]:
        model_type = "qwen3_vl_text" if name == "interleaved" else "qwen2_vl_text"
    if name == "partial":
        model_type = "stablelm"
    config = make_config(values | {"model_type": model_type})
    cos, sin = run_rotary(model_type, config, inputs["position_ids"])
    half = cos.shape[-1] // 2
    tables = cos[..., :half], sin[..., :half]
    return [rotate_eagerly(inputs[x], *tables, None, False) for x in ("query", "key")]


def run_formula(name, inputs):
    """Rotate with tables of float64 frequencies, of positions with one axis."""
    parameters, ids = make_rope(name).rope_parameters, inputs["position_ids"]
    length = int(ids.max()) + 1
    angles = ids.double()[..., None] * torch.from_numpy(compute_theta(parameters, length))
    factor = float(parameters.compute_attention_factor(length))
    tables = angles.cos() * factor, angles.sin() * factor
    return [rotate_eagerly(inputs[x].double(), *tables, None, False) for x in ("query", "key")]


@pytest.mark.parametrize("name", BUNDLES)
def test_proven(get_bundle, name):
    """The export verifies, in every runtime, and has tried both sides of a boundary."""
    bundle = get_bundle(name)
    assert bundle.report.passed
    runtimes = {row.runtime for row in bundle.report.rows if row.graph == "rotate"}
    assert {"ONNX Runtime, op library", "ONNX Runtime, function body", "onnx.reference"} <= runtimes
    assert ({"TorchScript", "torch.export"} <= runtimes) == (name in WHOLE)
    if name in ("longrope", "chunked-dynamic"):
        assert rotary_export.verify(bundle).passed
    lengths = bundle.report.shapes["tables"]
    if name in LENGTH_DEPENDENT:
        assert {f"seq_len {BOUNDARY}", f"seq_len {BOUNDARY + 1}"} <= set(lengths)


RUNS = [
    (name, path)
    for name in BUNDLES
    for path in PATHS
    if name in WHOLE or path in ("fused", "portable")
]


# Hugging Face's module ignores "mscales", of Phi-3.5-MoE alone.
THEIRS = [
    (name, path)
    for name, path in RUNS
    if name != "mscales" and BUNDLES[name]["rope_type"] in HF_ROPE_TYPES
]
LENGTHS = (1, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, ROWS - 3, ROWS, 2)


@pytest.mark.parametrize(("name", "path"), THEIRS)
def test_equal_to_transformers(get_bundle, name, path):
    """Each runtime at untraced sizes, on both sides of the boundary, with the ids in any order."""
    session = rotary_export.load(get_bundle(name), **PATHS[path])
    computes = "dynamic" in name and path in ("fused", "portable")
    for length in LENGTHS:
        inputs = make_inputs(name, length)
        outputs = session(**inputs).values()
        for got, want in zip(outputs, run_theirs(name, inputs), strict=True):
            if path in EXACT_PATHS and not computes:
                assert_same_bits(got, want, (name, length))
            else:
                torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in BUNDLES if "mrope_section" not in BUNDLES[name]])
def test_equal_to_the_formula(get_bundle, name):
    """Also of a rope type that transformers lacks. Angles are below 40: 40 * 4e-6 at most."""
    session = rotary_export.load(get_bundle(name))
    for length in LENGTHS:
        inputs = make_inputs(name, length)
        outputs = session(**inputs).values()
        for got, want in zip(outputs, run_formula(name, inputs), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", BUNDLES)
def test_one_fused_node(get_bundle, name):
    bundle = get_bundle(name)
    model = onnx.load(bundle.path / "rotate.onnx")
    nodes = [node for node in model.graph.node if node.op_type == "RotaryEmbedding"]
    assert [node.domain for node in nodes] == ["rotary_export"]
    stored = {t.name: tuple(t.dims) for t in model.graph.initializer if len(t.dims) == 2}
    half = 4 if name == "partial" else HALF
    if "dynamic" in name:
        assert stored == {"inv_freq": (ROWS - BOUNDARY + 1, half)}
    else:
        rows = ROWS + BOUNDARY if name in ("longrope", "mscales", "chunked-longrope") else ROWS
        assert stored == {"cos_cache": (rows, half), "sin_cache": (rows, half)}


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_short_tables_have_no_boundary(tmp_path, name):
    bundle = rotary_export.export(
        make_rope(name), tmp_path / "b", max_seq_len=BOUNDARY, formats=("onnx",)
    )
    model = onnx.load(bundle.path / "rotate.onnx")
    stored = {t.name: tuple(t.dims) for t in model.graph.initializer if len(t.dims) == 2}
    assert stored == {"cos_cache": (BOUNDARY, HALF), "sin_cache": (BOUNDARY, HALF)}


@pytest.mark.parametrize("name", ["longrope", "dynamic", "yarn", "mscales", "proportional"])
def test_static(tmp_path, name):
    bundle = rotary_export.export(
        make_rope(name), tmp_path / "b", max_seq_len=ROWS, num_heads=2, batch_size=2, static=True
    )
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 2, ROWS, 2 * HALF, generator=generator)
    for path, arguments in PATHS.items():
        session = rotary_export.load(bundle, **arguments)
        for length in (0, 1, BOUNDARY, BOUNDARY + 1, ROWS):
            outputs = session(query=query, key=key, seq_len=torch.tensor(length)).values()
            ids = torch.arange(length)[None]
            cos, sin = make_rope(name)(ids)
            for got, x in zip(outputs, (query, key), strict=True):
                want = rotate_eagerly(x[:, :, :length], cos, sin, None, False)
                torch.testing.assert_close(got[:, :, :length], want, rtol=0, atol=2e-6, msg=path)
                assert_same_bits(got[:, :, length:], x[:, :, length:], (path, length))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_other_types(tmp_path, name, dtype):
    bundle = rotary_export.export(
        make_rope(name), tmp_path / "b", max_seq_len=ROWS, dtype=dtype, formats=("onnx",)
    )
    assert bundle.report.passed


@pytest.mark.parametrize("name", ["longrope", "dynamic", "chunked"])
def test_interleaved_and_opset_18(tmp_path, name):
    bundle = rotary_export.export(
        make_rope(name),
        tmp_path / "b",
        max_seq_len=ROWS,
        interleaved=True,
        head_dim=20,
        opset=18,
        formats=("onnx",),
    )
    assert bundle.report.passed


@pytest.mark.parametrize(("name", "path"), RUNS)
def test_bad_ids(get_bundle, name, path):
    """Refused by session(...), naming the id as it was given; never rotated by another's row."""
    session = rotary_export.load(get_bundle(name), **PATHS[path])
    for bad in (-1, ROWS, ROWS + BOUNDARY):
        inputs = make_inputs(name, ROWS)
        inputs["position_ids"][..., 2, 3] = bad
        message = f"position_ids must be in [0, {ROWS}), got {bad} at batch 2, row 3"
        with pytest.raises(RotaryExportError) as raised:
            session(**inputs)
        assert str(raised.value) == message


@pytest.mark.parametrize("name", ["default", "longrope", "chunked", "chunked-longrope"])
def test_bad_ids_in_a_bare_graph(get_bundle, name):
    """Where tables are stored the op itself refuses, also the row of the table beside."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(rotary_export.runtime.op_library_path()))
    session = onnxruntime.InferenceSession(
        str(get_bundle(name).path / "rotate.onnx"), options, providers=["CPUExecutionProvider"]
    )
    for bad in (-1, ROWS, ROWS + BOUNDARY, ROWS + BOUNDARY - 1):
        inputs = make_inputs(name, ROWS)
        inputs["position_ids"][..., 2, 3] = bad
        with pytest.raises(Exception, match=r"position_ids|[Ii]nd(ex|ices)"):
            session.run(None, {key: value.numpy() for key, value in inputs.items()})


def test_a_wrong_boundary_fails_the_proof(tmp_path, monkeypatch):
    """A graph that always reads the short table is refused."""
    from rotary_export.rope.scaled_query_key import StoredQueryKey

    monkeypatch.setattr(StoredQueryKey, "find_rows", lambda self, position_ids: position_ids)
    with pytest.raises(CheckFailedError, match="the export is not equal to eager"):
        rotary_export.export(
            make_rope("longrope"), tmp_path / "b", max_seq_len=ROWS, formats=("onnx",)
        )
    assert not any(tmp_path.iterdir())


VISION = ("kimi_k25_vision", "llama4_vision_model", "minimax_m3_vl_vision", "pixtral")


@pytest.mark.parametrize("model_type", VISION)
def test_vision(tmp_path, model_type):
    """Rows and columns of an image as ids, in every layout; compared with the oracle."""
    rope = ScaledRotaryEmbedding(read_rope({"model_type": model_type, "head_dim": 20})[None])
    bundle = rotary_export.export(
        rope, tmp_path / "b", max_seq_len=ROWS, head_dim=20, formats=("onnx",)
    )
    assert bundle.report.passed
    ids = torch.randint(0, ROWS, (rope.num_axes, 2, 7))
    query, key = torch.randn(2, 2, 1, 7, 20)
    outputs = rotary_export.load(bundle)(query=query, key=key, position_ids=ids)
    cos, sin = rope(ids)
    for got, x in zip(outputs.values(), (query, key), strict=True):
        assert_same_bits(got, rotate_eagerly(x, cos, sin, None, False), model_type)


def test_refused(tmp_path):
    def export(name, **options):
        return lambda: rotary_export.export(make_rope(name), tmp_path / "b", **options)

    check_refused(
        "a static export has one position for each row, this rope has 3",
        export("chunked", static=True, batch_size=2, num_heads=2),
        tmp_path,
    )
    coordinates = ScaledRotaryEmbedding(
        read_rope({"model_type": "dinov3_vit", "head_dim": 16})[None]
    )
    check_refused(
        "the positions of this rope are coordinates",
        lambda: rotary_export.export(coordinates, tmp_path / "b", max_seq_len=8),
        tmp_path,
    )
    check_refused("rotary_dim must be even and <= head_dim", export("yarn", head_dim=8), tmp_path)
    no_length = dataclasses.replace(read_rope(make_values("yarn"))[None], max_position_embeddings=0)
    check_refused(
        "max_seq_len must be given to export or to the ScaledRotaryEmbedding",
        lambda: rotary_export.export(ScaledRotaryEmbedding(no_length), tmp_path / "b"),
        tmp_path,
    )


@pytest.mark.parametrize("name", ["chunked", "dynamic"])
def test_bench(get_bundle, name):
    arguments = [
        "bench",
        str(get_bundle(name).path),
        "--shape",
        "2",
        "5",
        "--seconds",
        "0",
        "--json",
    ]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
