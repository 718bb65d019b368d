"""The CUDA kernel's code on the CPU: every thread of many launches, against the CPU kernel.

`rotary_export/csrc/README.md` lists what this does not show: nothing here has run on a GPU.
"""

from __future__ import annotations

import itertools
import mmap

import numpy as np
import pytest
import torch
from helpers.cases import ID_FORMS, flatten_heads, make_inputs
from helpers.cuda_emulator import OUTPUT_OF, SENTINEL, check_against_cpu, emulate, make_outputs
from helpers.kernel_calls import rotate
from helpers.oracles import assert_same_bits

from rotary_export.op import spec

NO_RESERVE = 0x4000  # MAP_NORESERVE: untouched pages need no memory.


@pytest.mark.parametrize("interleaved", [0, 1], ids=["half", "interleaved"])
@pytest.mark.parametrize("form", ID_FORMS)
@pytest.mark.parametrize("types", spec.TYPE_PAIRS, ids="-".join)
def test_every_form_has_the_bits_of_the_cpu_kernel(types, form, interleaved):
    rng = np.random.default_rng(30)
    for head_dim, rotary_dim in ((8, 0), (10, 6), (64, 32), (80, 0)):
        for kv_heads, scaled in itertools.product((0, 2), (False, True)):
            inputs = make_inputs(
                rng,
                types,
                form,
                sizes=(2, 3, 5, head_dim),
                kv_heads=kv_heads,
                rotary_dim=rotary_dim,
                scaled=scaled,
            )
            options = {"interleaved": interleaved, "rotary_embedding_dim": rotary_dim}
            what = f"H={head_dim} R={rotary_dim} Nkv={kv_heads} scaled={scaled}"
            width = 16 // inputs["X"].element_size()  # A vector of 16 bytes.
            has_vectors = head_dim % width == 0 and (rotary_dim or head_dim) // 2 % width == 0
            for in_place in (False, True):
                ran = check_against_cpu(inputs, what, in_place=in_place, **options)
                assert ran.launches == 1  # For query and key.
                assert ran.vector_launches == has_vectors
            flat = {k: flatten_heads(v) if k in OUTPUT_OF else v for k, v in inputs.items()}
            check_against_cpu(flat, what, num_heads=3, kv_num_heads=kv_heads, **options)


def test_sizes_that_divide_nothing():
    rng = np.random.default_rng(31)
    vector_launches = 0
    for case in range(400):
        types = spec.TYPE_PAIRS[case % len(spec.TYPE_PAIRS)]
        head_dim = 2 * int(rng.integers(1, 161))
        rotary_dim = int(rng.choice([0, 2 * rng.integers(1, head_dim // 2 + 1)]))
        if case % 3 == 0:  # Vectors, in numbers that don't divide a block.
            head_dim, rotary_dim = 16 * (head_dim // 16 or 1), 16 * (rotary_dim // 16)
        batch, heads, kv_heads = (int(n) for n in rng.integers((1, 1, 0), (4, 6, 3)))
        inputs = make_inputs(
            rng,
            types,
            rng.choice(ID_FORMS),
            sizes=(batch, heads, round(300 ** rng.random()), head_dim),
            kv_heads=kv_heads,
            rotary_dim=rotary_dim,
            scaled=bool(rng.integers(2)),
        )
        what = f"case {case} {types} {[tuple(x.shape) for x in inputs.values()]}"
        ran = check_against_cpu(
            inputs,
            what,
            in_place=bool(rng.integers(2)),
            interleaved=int(rng.integers(2)),
            rotary_embedding_dim=rotary_dim,
        )
        vector_launches += ran.vector_launches
    assert vector_launches > 100


# Sizes at which a thread rotates several heads, rows, chunks or batch entries, or none.
LARGE = {
    "several-heads-per-thread": ((1, 39, 2048, 64), "float32", "offset"),
    "more-chunks-than-threads": ((1, 2, 3, 1030), "float32", "shared"),
    "more-batch-entries-than-blocks": ((70_000, 1, 1, 2), "float32", "shared"),
    "more-heads-than-blocks": ((1, 300_000, 1, 2), "float32", "shared"),
    "decode-batch": ((200, 2, 1, 16), "float16", "per-batch"),
    "batch-of-prompts": ((7, 2, 150, 16), "float16", "tables-per-batch"),
    "no-batch": ((0, 2, 3, 16), "float32", "shared"),
    "no-rows": ((2, 2, 0, 16), "float32", "per-batch"),
    "no-heads": ((2, 0, 3, 16), "float32", "per-batch"),
}


@pytest.mark.parametrize("case", LARGE)
def test_large_and_empty_sizes(case):
    sizes, dtype, form = LARGE[case]
    kv_heads = 0 if "no" in case or "more" in case else 1
    inputs = make_inputs(
        np.random.default_rng(32), (dtype, dtype), form, sizes=sizes, kv_heads=kv_heads
    )
    if inputs["X"].numel() == 0:
        inputs["X"] = torch.empty(sizes)  # numpy's has no strides.
    ran = check_against_cpu(inputs, case)
    assert ran.launches == (0 if case.startswith("no-") else 1)
    if case == "several-heads-per-thread":
        assert ran.largest_grid == 2048 // (256 // 8) * (20 + 1)  # 39 query heads in pairs.


def test_rows_follow_their_strides_and_gaps_are_not_written():
    inputs = make_inputs(np.random.default_rng(33), kv_heads=2)
    for name in OUTPUT_OF:  # (B, S, N, H) in memory, in rows of 11 or 12: one element, or vectors.
        for width in (11, 12):
            x = inputs[name]
            wide = torch.zeros(x.shape[0], x.shape[2], x.shape[1], width).transpose(1, 2)
            inputs[name] = wide[..., :8].copy_(x)
            ran = check_against_cpu(inputs, f"{name} {width}")
            assert ran.vector_launches == (width == 12)


@pytest.mark.parametrize("name", ["X", "key"])
@pytest.mark.parametrize("gap_after", ["row", "head", "batch entry", "nothing", "padded row"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (16, 8), (16, 12), (10, 8)])
def test_vectors_are_for_tensors_that_are_multiples_of_them(name, gap_after, head_dim, rotary_dim):
    inputs = make_inputs(
        np.random.default_rng(44), sizes=(2, 4, 4, head_dim), kv_heads=4, rotary_dim=rotary_dim
    )
    row = head_dim + (gap_after == "row")
    if gap_after == "padded row":
        row = (head_dim + 3) // 4 * 4
    head = 4 * row + (gap_after == "head")
    batch = 4 * head + (gap_after == "batch entry")
    for spread in ("X", "key") if gap_after == "padded row" else (name,):
        x = inputs[spread]
        inputs[spread] = torch.empty_strided(x.shape, (batch, head, row, 1)).copy_(x)
    ran = check_against_cpu(inputs, rotary_embedding_dim=rotary_dim)
    divides = head_dim % 4 == 0 and rotary_dim // 2 % 4 == 0
    assert ran.vector_launches == (gap_after in ("nothing", "padded row") and divides)


@pytest.mark.parametrize("name", ["X", "Y", "cos_cache", "scale_cache", "key_out"])
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_a_tensor_that_is_not_aligned_is_read_element_by_element(name, offset):
    inputs = make_inputs(
        np.random.default_rng(34), form="tables-per-batch", kv_heads=1, scaled=True
    )
    want = make_outputs(inputs)
    assert rotate({**inputs, **want}) == ""
    tensors = {**inputs, **make_outputs(inputs)}
    moved = torch.empty(tensors[name].numel() + offset)[offset:].view(tensors[name].shape)
    tensors[name] = moved.copy_(tensors[name])
    ran = emulate(tensors)
    assert (ran.message, ran.vector_launches) == ("", offset == 4)
    for output, y in want.items():
        assert_same_bits(tensors[output], y)


# Ids, and the number of launches: each holds 256 runs of consecutive positions.
IDS = {
    "prompt": (torch.arange(3000)[None], 1),
    "packed-100-documents": (torch.arange(10).repeat(100)[None], 1),
    "256-runs": (torch.arange(512).flip(0)[:256][None], 1),
    "257-runs": (torch.arange(512).flip(0)[:257][None], 2),
    "no-two-consecutive": (torch.arange(2000).flip(0)[None], 8),
    "all-equal": (torch.zeros(1, 300, dtype=torch.int64), 2),
    "left-padded-batch": (torch.cat((torch.ones(4, 40), torch.arange(60).expand(4, 60)), 1), 1),
    "decode-batch-600": (torch.arange(600).flip(0)[:, None], 3),
    "runs-over-batch-entries": (torch.arange(600).view(6, 100), 1),
    "launches-that-end-inside-a-batch-entry": (torch.arange(999).flip(0).view(3, 333), 4),
}


@pytest.mark.parametrize(
    ("case", "batch_size"),
    [(case, len(ids)) for case, (ids, _) in IDS.items()]
    + [(case, 3) for case, (ids, _) in IDS.items() if len(ids) == 1],
)
def test_positions_are_arguments_of_the_kernel(case, batch_size):
    ids, launches = IDS[case]
    ids = ids.to(torch.int64)
    inputs = make_inputs(
        np.random.default_rng(35), sizes=(batch_size, 2, ids.shape[1], 4), kv_heads=1
    )
    table = torch.randn(int(ids.max()) + 1, 2)
    inputs |= {"position_ids": ids, "cos_cache": table, "sin_cache": table + 1}
    assert check_against_cpu(inputs, case).launches == launches


def test_positions_past_32_bits():
    first = 2**31 - 2
    memory = mmap.mmap(-1, 2 * (first + 5), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    table = torch.frombuffer(memory, dtype=torch.float16).view(-1, 1)  # Two pages are touched.
    table[first:] = torch.arange(5.0).half()[:, None]
    inputs = make_inputs(
        np.random.default_rng(43), ("float16", "float16"), sizes=(1, 2, 5, 2), kv_heads=1
    )
    ids = torch.tensor([[first, first + 1, first + 2, first + 4, 0]])
    inputs |= {"position_ids": ids, "cos_cache": table, "sin_cache": table}
    check_against_cpu(inputs)


def test_a_bad_id_launches_nothing():
    inputs = make_inputs(np.random.default_rng(36), kv_heads=1)
    inputs["position_ids"][1, 4] = 8
    outputs = make_outputs(inputs)
    ran = emulate({**inputs, **outputs})
    assert ran.message == spec.bad_id_message(8, 1, 4, 8)
    assert ran.launches == 0
    assert (outputs["Y"] == SENTINEL).all()


@pytest.mark.parametrize("form", ID_FORMS)
def test_a_cuda_graph_may_hold_tables_but_no_ids(form):
    inputs = make_inputs(np.random.default_rng(37), form=form)
    ran = emulate({**inputs, **make_outputs(inputs)}, capture_status=1)
    if "position_ids" in inputs:
        assert ran.message.startswith("position_ids are read on the host, which a CUDA graph does")
        assert ran.launches == 0
    else:
        assert (ran.message, ran.launches) == ("", 1)


def test_an_error_of_the_driver_is_reported():
    inputs = make_inputs(np.random.default_rng(38))
    ran = emulate({**inputs, **make_outputs(inputs)}, launch_error=700)
    assert ran.message == "cuLaunchKernel failed with error 700, CUDA_ERROR_EMULATED"
