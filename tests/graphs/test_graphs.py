"""What is exported, before any exporter: the checked arguments, and the graphs of each kind."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from helpers.oracles import assert_same_bits
from helpers.rope_cases import BOUNDARY, BUNDLES
from helpers.scaled_bundles import ROWS, make_rope

from rotary_export import RotaryEmbedding, RotaryExportError
from rotary_export.graphs.config import check_config, read_config
from rotary_export.graphs.graph import Graph, make_graphs
from rotary_export.graphs.kinds import KINDS, make_kind

ROPES = {
    "plain": lambda: RotaryEmbedding(16),
    "xpos": lambda: RotaryEmbedding(16, True, 64),
    **{name: lambda name=name: make_rope(name) for name in BUNDLES},
}
EVERY = pytest.mark.parametrize("name", ROPES)
ONE_AXIS = [name for name in ROPES if "mrope_section" not in BUNDLES.get(name, {})]
LENGTHS = (0, 1, BOUNDARY, BOUNDARY + 1, ROWS - 1, ROWS)


def make(name: str, **options: Any) -> tuple[Graph, Graph]:
    rope = ROPES[name]()
    config = check_config(rope, max_seq_len=ROWS, head_dim=20, **options)
    state = config.rope.collect_buffers(rope, ROWS)
    return make_graphs(config, state)


def draw(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(2, 4, rows, 20, generator=generator)
    return query, torch.randn(2, 2, rows, 20, generator=generator)


# ---- graphs


@EVERY
def test_tables_have_every_row_of_the_module(name):
    """Rows below seq_len are the module's, the others the identity."""
    tables, _ = make(name)
    rope = ROPES[name]()
    for length in LENGTHS:
        got = tables.module(torch.tensor(length))
        assert [info.shape for info in tables.outputs] == [value.shape for value in got]
        is_plain = isinstance(rope, RotaryEmbedding)
        want = rope(length) if is_plain else [t[0] for t in rope(torch.arange(length)[None])]
        for table, rows, identity in zip(got, want, (0, 1) if is_plain else (1, 0), strict=True):
            if table.dim() == 2:
                assert_same_bits(table[:length], rows, length)
                assert (table[length:] == identity).all()


@pytest.mark.parametrize("name", ONE_AXIS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_static_rotates_the_first_rows_as_dynamic_does(name, interleaved):
    options = {"interleaved": interleaved, "num_heads": 4, "num_kv_heads": 2}
    _, dynamic = make(name, **options)
    _, static = make(name, **options, static=True, batch_size=2)
    query, key = draw(ROWS)
    for length in LENGTHS:
        got = static.module(query, key, torch.tensor(length))
        want = dynamic.module(query[:, :, :length], key[:, :, :length], torch.arange(length)[None])
        for y, rotated, x in zip(got, want, (query, key), strict=True):
            assert_same_bits(y[:, :, :length], rotated, length)
            assert_same_bits(y[:, :, length:], x[:, :, length:], length)


@EVERY
def test_inputs_have_the_shapes_of_the_graph(name):
    _, rotate = make(name)
    sizes = {"batch_size": 2, "num_heads": 4, "num_kv_heads": 2, "seq_len": 5}
    inputs = rotate.make_inputs(sizes)
    axes = (3,) if name not in ONE_AXIS else ()
    assert inputs[2].shape == (*axes, 2, 5)
    for output, x in zip(rotate.module(*inputs), inputs, strict=False):
        assert output.shape == x.shape
    assert not (rotate.module(*inputs)[0] == inputs[0]).all()


# ---- configs


@EVERY
def test_a_config_reads_back(name):
    rope = ROPES[name]()
    config = check_config(rope, max_seq_len=ROWS, num_heads=4)
    assert read_config(json.loads(json.dumps(config.to_dict()))) == config
    assert make_kind(rope) == config.rope


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": None}, "embedding must be an object, got NoneType"),
        ({"embedding": {"dim": 8, "more": 1}}, "unexpected keyword argument 'more'"),
        ({"rope": {"rope_type": "default"}}, "one of embedding and rope is required, got 2"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
    ],
    ids=["null", "argument", "both", "more"],
)
def test_a_damaged_config_is_refused(change, message):
    config = check_config(RotaryEmbedding(16), max_seq_len=ROWS).to_dict()
    with pytest.raises(RotaryExportError, match=f"the manifest's config is damaged: .*{message}"):
        read_config(config | change)
    config.pop("embedding")
    with pytest.raises(RotaryExportError, match="one of embedding and rope is required, got 0"):
        read_config(config)


def test_a_subclass_is_refused():
    """It may compute something else."""
    for kind in KINDS:
        mine = type("Mine", (kind,), {})
        with pytest.raises(RotaryExportError, match=r"or x-transformers, got [\w.]+\.Mine$"):
            make_kind(mine.__new__(mine))


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_heads": 0}, "num_heads must be >= 1, got 0"),
    "kv-heads": (
        {"num_heads": 4, "num_kv_heads": 3},
        "num_heads must be a multiple of num_kv_heads, got num_heads=4, num_kv_heads=3",
    ),
    "head-dim": (
        {"head_dim": 8},
        "rotary_dim must be even and <= head_dim, got rotary_dim=16, head_dim=8",
    ),
    "max-seq-len": ({"max_seq_len": 0}, "max_seq_len must be an int >= 1, got 0"),
    "static": (
        {"static": True},
        "a static export needs batch_size and num_heads, got batch_size=None, num_heads=None",
    ),
    "batch-size": (
        {"batch_size": 2},
        "batch_size is for static=True (else the batch is dynamic), got 2",
    ),
    "dtype": (
        {"dtype": torch.int64},
        "dtype must be one of float32, float16, bfloat16, float64, got torch.int64",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(RotaryExportError, match=f"^{re.escape(message)}$"):
        check_config(RotaryEmbedding(16, max_seq_len=32), **options)


def test_module_and_length_are_required():
    message = "max_seq_len must be given to export or to the RotaryEmbedding"
    with pytest.raises(RotaryExportError, match=f"^{message}$"):
        check_config(RotaryEmbedding(16))
    message = (
        "module must be a rotary_export.RotaryEmbedding or ScaledRotaryEmbedding, or the "
        "RotaryEmbedding of zeta or x-transformers, got torch.nn.modules.linear.Linear"
    )
    with pytest.raises(RotaryExportError, match=f"^{message}$"):
        check_config(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("dim", "scale_base", "dtype", "longest"),
    [
        (64, 512, torch.float32, 72521),
        (64, 512, torch.float64, 72521),  # the tables are float32
        (64, 512, torch.bfloat16, 72519),
        (64, 512, torch.float16, 9065),
        (8, 77.7, torch.float32, 11005),
        (4, 1024, torch.float16, 18129),
        (4, 1024, torch.bfloat16, 145039),
    ],
)
def test_the_longest_xpos_length_is_exact(dim, scale_base, dtype, longest):
    rope = RotaryEmbedding(dim, True, scale_base)

    def fits(length: int) -> bool:
        _, scale = rope(length)
        both = torch.stack((scale, scale**-1)).to(dtype)
        return bool(both.isfinite().all())

    assert fits(longest)
    assert not fits(longest + 1)
    check_config(rope, max_seq_len=longest, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    message = (
        f"with xPos (dim={dim}, scale_base={scale_base}) the scale leaves the range of {name} at "
        f"max_seq_len={longest + 1}; the longest that fits is {longest}"
    )
    with pytest.raises(RotaryExportError, match=f"^{re.escape(message)}$"):
        check_config(rope, max_seq_len=longest + 1, dtype=dtype)
