"""The C functions of `rotary_export.h`: `RotaryExportRotate` without ONNX Runtime."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
from helpers.cases import make_inputs
from helpers.kernel_calls import Call, Team, make_call, rotate
from helpers.oracles import Tensors, assert_same_bits, compute_eager
from helpers.paths import CSRC

from rotary_export.errors import RotaryExportError
from rotary_export.op import library as op_library
from rotary_export.op import spec

LIBRARY = op_library.op_library_path()


@pytest.fixture
def tensors() -> Tensors:
    inputs = make_inputs(np.random.default_rng(1), kv_heads=2, rotary_dim=4, scaled=True)
    outputs = {"Y": torch.full((2, 3, 5, 8), -77.0), "key_out": torch.full((2, 2, 5, 8), -77.0)}
    return inputs | outputs


def test_rotate_returns_the_bits_of_the_oracle(tensors):
    assert rotate(tensors, rotary_embedding_dim=4) == ""
    for name, want in zip(spec.OUTPUTS, compute_eager(tensors, False), strict=True):
        assert_same_bits(tensors[name], want)


def rotate_team(team: Team) -> None:
    op_library.load_library().RotaryExportRotateTeam(ctypes.byref(team))


def make_team(tensors: Tensors, parts: int, **fields: int) -> Team:
    return Team(ctypes.pointer(make_call(tensors, rotary_embedding_dim=4)), parts, **fields)


@pytest.mark.parametrize("parts", [1, 2, 3, 10, 17])
def test_a_team_of_one_thread_rotates_every_part(tensors, parts):
    team = make_team(tensors, parts)
    rotate_team(team)
    assert (team.ended, team.failed, team.message) == (parts, 0, b"")
    for name, want in zip(spec.OUTPUTS, compute_eager(tensors, False), strict=True):
        assert_same_bits(tensors[name], want)


@pytest.mark.parametrize("parts", [2, 3, 10, 17])
def test_a_part_is_its_share_of_the_rows(tensors, parts):
    wanted = compute_eager(tensors, False)
    rows = [10 * part // parts for part in range(parts + 1)]  # of batch 2 and S 5
    for part in range(parts):
        given = {name: x.clone() for name, x in tensors.items()}
        team = make_team(given, parts, begun=part + 1, ended=part + 1)  # as if others were done
        rotate_team(team)
        for name, want in zip(spec.OUTPUTS, wanted, strict=True):
            by_row = given[name].transpose(1, 2).flatten(0, 1), want.transpose(1, 2).flatten(0, 1)
            assert (by_row[0][: rows[part + 1]] == -77).all()
            assert_same_bits(*(x[rows[part + 1] :] for x in by_row))


def test_threads_of_a_team_share_the_parts():
    inputs = make_inputs(np.random.default_rng(1), rotary_dim=4)
    (wanted,) = compute_eager(inputs, False)
    for _ in range(200):
        y = torch.full_like(inputs["X"], -77)
        team = make_team(inputs | {"Y": y}, 5)
        threads = [threading.Thread(target=rotate_team, args=(team,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        rotate_team(team)
        assert (team.ended, team.failed) == (5, 0)
        assert_same_bits(y, wanted)
        for thread in threads:
            thread.join()


def test_a_team_waits_for_the_parts_of_other_threads(tensors):
    team = make_team(tensors, 2, begun=1)  # Part 0 is another thread's.
    thread = threading.Thread(target=rotate_team, args=(team,))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    team.ended += 1
    thread.join(30)
    assert not thread.is_alive()
    assert (team.ended, team.failed) == (2, 0)


def test_every_part_of_a_team_reports_and_the_first_message_stays(tensors):
    tensors["position_ids"][1, 4] = 8
    team = make_team(tensors, 3)
    rotate_team(team)
    message = spec.bad_id_message(8, 1, 4, 8)
    assert (team.ended, team.failed, team.message.decode()) == (3, 3, message)
    assert (tensors["Y"] == -77).all()
    second = make_team(tensors, 2, failed=1, message=b"first")
    rotate_team(second)
    assert (second.failed, second.message) == (3, b"first")


@pytest.mark.parametrize("parts", [0, -1])
def test_a_team_refuses_a_number_of_parts_that_is_none(tensors, parts):
    team = make_team(tensors, parts)
    rotate_team(team)
    assert team.message.decode() == f"parts must be at least 1, got parts={parts}"
    assert team.failed == 1
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
        (lambda t: t.pop("X"), "X, cos_cache and sin_cache must be given"),
        (lambda t: t.pop("cos_cache"), "X, cos_cache and sin_cache must be given"),
        (lambda t: t.pop("sin_cache"), "X, cos_cache and sin_cache must be given"),
        (lambda t: t.pop("Y"), "Y must be given"),
        (
            lambda t: t.pop("key"),
            "key_out must be given if and only if key is, got key_out but no key",
        ),
        (
            lambda t: t.pop("key_out"),
            "key_out must be given if and only if key is, got key but no key_out",
        ),
        (as_type("X", torch.int64), spec.bad_x_type_message("int64")),
        (as_type("key", torch.float16), spec.bad_type_message("key", "float16", "float32")),
        (
            as_type("sin_cache", torch.float16),
            spec.mismatched_table_message("sin_cache", "float16", "float32"),
        ),
        (
            as_type("scale_cache", torch.float64),
            spec.mismatched_table_message("scale_cache", "float64", "float32"),
        ),
        (as_type("position_ids", torch.float32), spec.bad_id_type_message("float32")),
        (
            as_type("Y", torch.float64),
            "Y must have the type and shape of X, "
            "got float64 (2, 3, 8, 8) and float32 (2, 3, 8, 8)",
        ),
        (
            lambda t: t.update(key_out=t["key_out"][:, :1]),
            "key_out must have the type and shape of key, "
            "got float32 (2, 1, 8, 8) and float32 (2, 2, 8, 8)",
        ),
        (
            lambda t: t.update(X=t["X"].mT),
            "X must be contiguous in its last dimension, "
            "got strides (192, 64, 1, 8) for shape (2, 3, 8, 8)",
        ),
        (
            lambda t: t.update(key_out=t["key_out"].mT),
            "key_out must be contiguous in its last dimension, "
            "got strides (128, 64, 1, 8) for shape (2, 2, 8, 8)",
        ),
        (
            lambda t: t.update(cos_cache=t["cos_cache"].mT.contiguous().mT),
            "cos_cache must be contiguous, got strides (1, 8) for shape (8, 2)",
        ),
        (
            lambda t: t.update(position_ids=torch.zeros(1, 16, dtype=torch.int64)[:, ::2]),
            "position_ids must be contiguous, got strides (16, 2) for shape (1, 8)",
        ),
    ],
)
def test_rotate_reports_what_is_wrong(tensors, spoil, message):
    tensors["X"] = torch.zeros(2, 3, 8, 8)  # Square, so that its transpose has the same shape.
    tensors |= {"Y": torch.zeros(2, 3, 8, 8), "position_ids": torch.zeros(1, 8, dtype=torch.int64)}
    tensors |= {"key": torch.zeros(2, 2, 8, 8), "key_out": torch.zeros(2, 2, 8, 8)}
    spoil(tensors)
    assert rotate(tensors, rotary_embedding_dim=4) == message


X, COS = (2, 3, 5, 8), (9, 4)
BAD_SHAPES: dict[str, dict[str, object]] = {
    "x-rank": {"X": (2, 8)},
    "num-heads": {"X": (2, 5, 24), "num_heads": 5},
    "kv-num-heads": {"X": (2, 5, 24), "num_heads": 3, "key": (2, 5, 16), "kv_num_heads": 3},
    "rotary-dim-odd": {"rotary_embedding_dim": 3},
    "rotary-dim-too-large": {"rotary_embedding_dim": 10},
    "tables-with-ids": {"cos_cache": (9, 8)},
    "tables-without-ids": {"position_ids": None, "cos_cache": (3, 5, 4)},
    "ids": {"position_ids": (3, 5)},
    "ids-1d": {"position_ids": (2,)},
    "sin": {"sin_cache": (9, 3)},
    "scale": {"scale_cache": (8, 4)},
    "key-rank": {"key": (2, 5, 24)},
    "key-sizes": {"key": (2, 3, 4, 6)},
}


@pytest.mark.parametrize("bad", BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_bad_shapes_have_the_message_of_spec(bad):
    call = {"X": X, "cos_cache": COS, "position_ids": (2, 5), **bad}
    call["sin_cache"] = call.get("sin_cache", call["cos_cache"])
    attributes = {k: v for k, v in call.items() if isinstance(v, int)}
    with pytest.raises(RotaryExportError) as expected:
        spec.check_inputs([call.get(name) for name in spec.INPUTS], **attributes)
    shapes = {k: v for k, v in call.items() if isinstance(v, tuple)}
    inputs = {
        name: torch.zeros(shape, dtype=torch.int64 if name == "position_ids" else torch.float32)
        for name, shape in shapes.items()
    }
    assert rotate(inputs, **attributes) == str(expected.value)


TYPES = {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64", "int64")
}


@pytest.mark.parametrize("x_type", TYPES)
def test_the_pairs_of_types_are_those_of_spec(x_type):
    inputs = make_inputs(np.random.default_rng(3), form="tables-shared")
    for table_type, dtype in TYPES.items():
        tensors = {name: x.to(dtype) for name, x in inputs.items()}
        tensors["X"] = inputs["X"].to(TYPES[x_type])
        tensors["Y"] = torch.empty_like(tensors["X"])
        message = ""
        if x_type not in spec.X_TYPES:
            message = spec.bad_x_type_message(x_type)
        elif (x_type, table_type) not in spec.TYPE_PAIRS:
            message = spec.bad_type_message("cos_cache", table_type, x_type)
        assert rotate(tensors) == message


# (ids, table rows): the first bad id, its batch entry and its row; None: none is bad.
IDS = {
    "last-row": ([[0, 1, 2], [3, 3, 3]], 4, None),
    "one-past": ([[0, 1, 2], [3, 4, 9]], 4, (4, 1, 1)),
    "negative": ([[0, 1, -1], [3, 4, 9]], 4, (-1, 0, 2)),
    "shared": ([[0, 1, 4]], 4, (4, 0, 2)),
    "offset-fits": ([1], 4, None),
    "offset-one-past": ([2], 4, (4, 0, 2)),
    "offset-at-the-end": ([4], 4, (4, 0, 0)),
    "offset-negative": ([-1], 4, (-1, 0, 0)),
}


@pytest.mark.parametrize(("ids", "rows", "bad"), IDS.values(), ids=IDS)
def test_every_position_is_checked(ids, rows, bad):
    inputs = {"X": torch.randn(2, 1, 3, 8), "position_ids": torch.tensor(ids)}
    inputs |= {name: torch.randn(rows, 4) for name in ("cos_cache", "sin_cache")}
    y = torch.full((2, 1, 3, 8), -77.0)
    message = rotate({**inputs, "Y": y})
    if bad is None:
        assert message == ""
        assert_same_bits(y, compute_eager(inputs, False)[0])
    else:
        assert message == spec.bad_id_message(*bad, rows)
        assert (y == -77).all()


def test_a_null_call_reports_whether_the_library_can_be_used(tmp_path, monkeypatch):
    library = op_library._load_library(LIBRARY)
    assert library.RotaryExportRotate(None, None, 0) == 0
    monkeypatch.setenv("ROTARY_EXPORT_ISA", "none")
    spoiled = ctypes.CDLL(shutil.copy(LIBRARY, tmp_path))
    message = ctypes.create_string_buffer(24)
    assert spoiled.RotaryExportRotate(None, message, len(message)) == 1
    assert message.value == b"ROTARY_EXPORT_ISA must "  # Cut to the caller's buffer.


@pytest.mark.parametrize("struct", [Call, Team])
def test_the_structs_of_the_header_have_these_fields(struct):
    header = (CSRC / "rotary_export.h").read_text()
    body = header.split(f"struct RotaryExport{struct.__name__} {{")[1].split("};")[0]
    fields = re.findall(r"(\w+)(?:\[\d+\])?;", re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL))
    assert fields == [name.lower() for name, *_ in struct._fields_]


def test_the_program_of_the_page_is_plain_c_and_rotates(tmp_path):
    page = (CSRC / "README.md").read_text()
    (program,) = re.findall(r"^```c\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "example.c").write_text(program)
    compiler = os.environ.get("CC", "cc")
    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{CSRC}"]
    command = [compiler, *flags, "example.c", str(LIBRARY), "-o", "example"]
    subprocess.run(command, cwd=tmp_path, check=True)
    run = subprocess.run([tmp_path / "example"], capture_output=True, text=True, check=True)
    assert run.stdout == "-3 -4 1 2\n"
