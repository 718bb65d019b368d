"""The op for CUDA in ONNX Runtime, with its kernel emulated; the errors that the emulator finds."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from helpers.cases import ID_FORMS, TYPES, make_inputs
from helpers.cuda_emulator import (
    CSRC,
    check_against_cpu,
    compile_emulator,
    emulate,
    get_emulator,
    make_outputs,
)
from helpers.op_library import check_against_eager, run_session

from rotary_export.op import spec


@pytest.mark.parametrize("form", ID_FORMS)
@pytest.mark.parametrize("types", spec.TYPE_PAIRS, ids="-".join)
def test_onnx_runtime_runs_the_op_for_cuda(types, form):
    library = str(get_emulator())
    rng = np.random.default_rng(39)
    for kv_heads, rotary_dim, scaled in itertools.product((0, 1), (0, 4), (False, True)):
        inputs = make_inputs(
            rng, types, form, kv_heads=kv_heads, rotary_dim=rotary_dim, scaled=scaled
        )
        what = f"kv_heads={kv_heads} rotary_dim={rotary_dim} scaled={scaled}"
        check_against_eager(inputs, what, library=library, rotary_embedding_dim=rotary_dim)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_at_the_edges_of_the_half_types(dtype):
    # The emulator's own conversions, not the GPU's: the other tests rely on them.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(TYPES[dtype])
    inputs = make_inputs(
        np.random.default_rng(40), (dtype, "float32"), "tables-shared", sizes=(1, 1, 1024, 64)
    )
    inputs["X"] = every.reshape(1, 1, 1024, 64)
    check_against_cpu(inputs)


def test_the_contract_on_bad_ids_holds_in_onnx_runtime():
    inputs = make_inputs(np.random.default_rng(41))
    inputs["position_ids"][0, 2] = -1
    with pytest.raises(Exception, match="RotaryEmbedding node") as raised:
        run_session(inputs, library=str(get_emulator()))
    assert spec.bad_id_message(-1, 0, 2, 8) in str(raised.value)


# ---- the emulator detects wrong kernels

MUTATIONS = {
    "a-row-too-many": ("row >= launch.row_count", "row > launch.row_count", "stray"),
    "every-block-does-all": ("thread.block_x * launch.threads_y + ", "", "second write|read after"),
    "chunks-overlap": ("pair = chunk * kWidth", "pair = chunk * (kWidth - 1)", "misaligned"),
    "a-head-is-missing": ("head < heads.count;", "head + 1 < heads.count;", "not written"),
    "tail-not-copied": ("memory.Write(values, heads.out", "Ignore(values, heads.out", "not writ"),
    "key-reads-x": ("is_key ? launch.params.key :", "false ? launch.params.key :", "second|read"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_emulator_detects_a_wrong_kernel(mutation, tmp_path):
    right, wrong, complaint = MUTATIONS[mutation]
    sources = tmp_path / "csrc"
    shutil.copytree(CSRC, sources)
    header = sources / "cuda" / "rotate_thread.h"
    text = header.read_text()
    assert right in text
    text = text.replace(right, wrong)
    ignore = "template <typename A, typename B>\nvoid Ignore(const A&, const B&) {}\n"
    header.write_text(text.replace("namespace cuda {", f"namespace cuda {{\n{ignore}", 1))
    library = compile_emulator(tmp_path, sources)
    inputs = make_inputs(np.random.default_rng(42), sizes=(1, 3, 37, 64), kv_heads=2, rotary_dim=32)
    ran = emulate({**inputs, **make_outputs(inputs)}, library=library, rotary_embedding_dim=32)
    assert any(part in ran.message for part in complaint.split("|")), ran.message
