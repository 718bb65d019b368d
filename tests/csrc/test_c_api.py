"""The C functions of `rotary_export.h`: `RotaryExportRotate` without ONNX Runtime."""

from __future__ import annotations

import ctypes
import re
import shutil

import numpy as np
import pytest
import torch
from helpers.cases import make_inputs
from helpers.kernel_calls import Call, rotate
from helpers.oracles import Tensors, assert_same_bits, compute_eager
from helpers.paths import CSRC

from rotary_export.op import library as op_library
from rotary_export.op import spec

LIBRARY = op_library.op_library_path()


@pytest.fixture
def tensors() -> Tensors:
    inputs = make_inputs(np.random.default_rng(1), kv_heads=2, rotary_dim=4, scaled=True)
    outputs = {"Y": torch.full((2, 3, 5, 8), -77.0), "key_out": torch.full((2, 2, 5, 8), -77.0)}
    return inputs | outputs


def test_rotate_gives_the_bits_of_the_oracle(tensors):
    assert rotate(tensors, rotary_embedding_dim=4) == ""
    for name, want in zip(spec.OUTPUTS, compute_eager(tensors, False), strict=True):
        assert_same_bits(tensors[name], want)


@pytest.mark.parametrize("parts", [1, 2, 3, 10, 17])
def test_rotate_in_parts(tensors, parts):
    wanted = compute_eager(tensors, False)
    untouched = []
    for part in range(parts):
        assert rotate(tensors, rotary_embedding_dim=4, part=part, parts=parts) == ""
        untouched.append(int((tensors["Y"] == -77).sum()))
    rows = [10 * part // parts for part in range(1, parts + 1)]  # of batch 2 and S 5
    assert untouched == [(10 - done) * 3 * 8 for done in rows]
    for name, want in zip(spec.OUTPUTS, wanted, strict=True):
        assert_same_bits(tensors[name], want)


@pytest.mark.parametrize(("part", "parts"), [(-1, 2), (2, 2), (1, 0), (0, -1)])
def test_rotate_refuses_a_part_that_is_none(tensors, part, parts):
    message = rotate(tensors, rotary_embedding_dim=4, part=part, parts=parts)
    assert message == f"part must be in [0, parts), got part={part}, parts={parts}"
    assert (tensors["Y"] == -77).all()


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotate_in_place(tensors, interleaved):
    wanted = compute_eager(tensors, bool(interleaved))
    tensors |= {"Y": tensors["X"], "key_out": tensors["key"]}
    assert rotate(tensors, rotary_embedding_dim=4, interleaved=interleaved) == ""
    for name, want in zip(spec.OUTPUTS, wanted, strict=True):
        assert_same_bits(tensors[name], want)


def test_rotate_walks_strides_and_writes_nothing_else(tensors):
    wanted = compute_eager(tensors, False)
    for name in ("X", "key", "Y", "key_out"):  # (B, S, N, H) in memory, in rows of 11.
        x = tensors[name]
        wide = torch.full((x.shape[0], x.shape[2], x.shape[1], 11), -77.0)
        tensors[name] = wide.transpose(1, 2)[..., 2:10]
        tensors[name].copy_(x)
    assert rotate(tensors, rotary_embedding_dim=4) == ""
    for name, want in zip(spec.OUTPUTS, wanted, strict=True):
        assert_same_bits(tensors[name].contiguous(), want)
        whole = tensors[name]._base
        assert (whole[..., :2] == -77).all()
        assert (whole[..., 10:] == -77).all()


def test_rotate_writes_nothing_when_an_id_is_bad(tensors):
    tensors["position_ids"][1, 4] = 8
    message = rotate(tensors, rotary_embedding_dim=4)
    assert message == spec.bad_id_message(8, 1, 4, 8)
    assert (tensors["Y"] == -77).all()
    assert (tensors["key_out"] == -77).all()


def as_type(name: str, dtype: torch.dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("sin_cache"), "X, cos_cache and sin_cache must be given"),
        (lambda t: t.pop("Y"), "Y must be given"),
        (lambda t: t.pop("key"), "key_out must be given if and only if key is, got key_out but no"),
        (lambda t: t.pop("key_out"), "key_out must be given if and only if key is, got key but no"),
        (as_type("X", torch.int64), "X must be float32, float16, bfloat16 or float64, got int64"),
        (as_type("key", torch.float16), spec.bad_type_message("key", "float16", "float32")),
        (
            as_type("cos_cache", torch.bfloat16),
            spec.bad_type_message("cos_cache", "bfloat16", "float32"),
        ),
        (
            as_type("sin_cache", torch.float16),
            spec.mismatched_table_message("sin_cache", "float16", "float32"),
        ),
        (as_type("position_ids", torch.float32), spec.bad_id_type_message("float32")),
        (as_type("Y", torch.float64), "Y must have the type and shape of X, got float64 (2, 3, 8"),
        (lambda t: t.update(X=t["X"].mT), "X must be contiguous in its last dimension, got strid"),
        (lambda t: t.update(cos_cache=t["cos_cache"].mT.contiguous().mT), "cos_cache must be con"),
    ],
)
def test_rotate_says_what_is_wrong(tensors, spoil, message):
    tensors["X"] = torch.zeros(2, 3, 8, 8)  # Square, for its transpose to have a fitting shape.
    tensors |= {"Y": torch.zeros(2, 3, 8, 8), "position_ids": torch.zeros(1, 8, dtype=torch.int64)}
    tensors |= {"key": torch.zeros(2, 2, 8, 8), "key_out": torch.zeros(2, 2, 8, 8)}
    spoil(tensors)
    assert rotate(tensors, rotary_embedding_dim=4).startswith(message)


def test_a_null_call_reports_whether_the_library_can_be_used(tmp_path, monkeypatch):
    library = op_library._load_library(LIBRARY)
    assert library.RotaryExportRotate(None, None, 0) == 0
    monkeypatch.setenv("ROTARY_EXPORT_ISA", "none")
    spoiled = ctypes.CDLL(shutil.copy(LIBRARY, tmp_path))
    message = ctypes.create_string_buffer(24)
    assert spoiled.RotaryExportRotate(None, message, len(message)) == 1
    assert message.value == b"ROTARY_EXPORT_ISA must "  # Cut to the caller's buffer.


def test_spec_names_the_structs_fields():
    header = (CSRC / "rotary_export.h").read_text()
    body = header.split("struct RotaryExportCall {")[1].split("};")[0]
    fields = re.findall(r"(\w+);", body)
    assert fields == [name.lower() for name, _ in Call._fields_]
