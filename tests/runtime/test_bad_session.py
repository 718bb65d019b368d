"""A session refuses each wrong input with one clear error, and still works afterwards."""

from __future__ import annotations

import re

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.bundles import (
    PATHS,
    check_refused,
    get_bundle,
    make_arrays,
    make_tensors,
    run_eager,
    to_torch,
)
from helpers.oracles import assert_same_bits

from rotary_export import RotaryExportError, load
from rotary_export.op import library as op_library
from rotary_export.op import spec

NAN, INF = float("nan"), float("inf")

ANY_PATH = pytest.mark.parametrize("path", PATHS)
# bundle, inputs to change (None: left out), message
QUERY = "query must have shape (batch_size, num_heads, seq_len, 24)"
INPUTS = {
    "missing": (
        "plain",
        {"key": None},
        "rotate needs the input 'key'; it accepts query, key, posi",
    ),
    "unknown": ("plain", {"x": 1}, "rotate has no input 'x'; it accepts query, key, position_ids"),
    "list": ("plain", {"key": [1.0]}, "key must be a numpy array or a torch tensor, got list"),
    "none": ("plain", {"key": ()}, "key must be a numpy array or a torch tensor, got tuple"),
    "dtype object": ("plain", {"key": torch.float32}, "key must be a numpy array or a torch"),
    "double": ("plain", {"query": np.ones((3, 4, 7, 24))}, "query must be float32, got float64"),
    "big-endian": ("plain", {"key": np.ones((3, 2, 7, 24), ">f4")}, "key must be float32, got >f4"),
    "int32 ids": ("plain", {"position_ids": np.ones((3, 7), "i4")}, "position_ids must be int64"),
    "rank": ("plain", {"query": np.ones((4, 7, 24), "f4")}, f"{QUERY}, got (4, 7, 24)"),
    "head_dim": ("plain", {"query": np.ones((3, 4, 7, 16), "f4")}, "got (3, 4, 7, 16)"),
    "batch": (
        "plain",
        {"key": np.ones((2, 2, 7, 24), "f4")},
        "key must have shape (batch_size, num_kv_heads, seq_len, 24), batch_size=3",
    ),
    "ids length": (
        "plain",
        {"position_ids": np.ones((3, 8), "i8")},
        "position_ids must have shape (batch_size, seq_len), batch_size=3, seq_len=7, got (3, 8)",
    ),
    "mixed": (
        "plain",
        {"key": torch.ones(3, 2, 7, 24)},
        "inputs must be all numpy arrays or all torch tensors, "
        "got query ndarray, key Tensor, position_ids ndarray",
    ),
    "id -1": ("plain", {"position_ids": -1}, spec.bad_id_message(-1, 1, 2, 32)),
    "id max": ("plain", {"position_ids": 32}, spec.bad_id_message(32, 1, 2, 32)),
    "seq_len -1": (
        "static",
        {"seq_len": -1},
        "seq_len must be >= 0 and <= max_seq_len = 32, got -1",
    ),
    "seq_len over": (
        "static",
        {"seq_len": 33},
        "seq_len must be >= 0 and <= max_seq_len = 32, got",
    ),
    "seq_len float": (
        "static",
        {"seq_len": 3.0},
        "seq_len must be a numpy array or a torch tensor",
    ),
    "seq_len bool": (
        "static",
        {"seq_len": True},
        "seq_len must be a numpy array or a torch tensor",
    ),
    "seq_len huge": ("static", {"seq_len": 2**70}, "seq_len must be int64, got object"),
    "seq_len 1-D": ("static", {"seq_len": np.array([3])}, "seq_len must have shape (), got (1,)"),
    "static heads": (
        "static",
        {"query": np.ones((2, 3, 32, 16), "f4")},
        "query must have shape (2, 4, 32, 16), got (2, 3, 32, 16)",
    ),
}


def make_bad_inputs(name, changes):
    inputs = make_arrays(name)
    for key, value in changes.items():
        if key == "position_ids" and isinstance(value, int):
            inputs[key][1, 2:] = value
        else:
            inputs[key] = value
    return {key: value for key, value in inputs.items() if value is not None}


@ANY_PATH
@pytest.mark.parametrize("mistake", INPUTS)
def test_session(mistake, path, tmp_path):
    name, changes, message = INPUTS[mistake]
    session = load(get_bundle(name), **PATHS[path])
    inputs = make_bad_inputs(name, changes)
    check_refused(message, lambda: session(**inputs), tmp_path)
    inputs = make_arrays(name)  # and it still works
    assert len(session(**inputs)) == 2


@ANY_PATH
def test_a_device_that_the_runtime_does_not_read(path, tmp_path):
    session = load(get_bundle("plain"), **PATHS[path])
    inputs = make_tensors("plain")
    inputs["key"] = inputs["key"].to("meta")
    message = f"key must be on a device that {session.providers[0]} reads, got meta"
    check_refused(message, lambda: session(**inputs), tmp_path)


@pytest.mark.parametrize("bad", [-1, 32, 2**40, -(2**63)])
def test_ids_have_the_same_words_from_the_kernel(bad):
    """Without the session's checks, as a server or another language runs it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(op_library.op_library_path()))
    path = get_bundle("plain").path / "rotate.onnx"
    kernel = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    inputs = make_bad_inputs("plain", {"position_ids": bad})
    message = spec.bad_id_message(bad, 1, 2, 32)
    with pytest.raises(Exception, match=re.escape(message)):
        kernel.run(None, inputs)
    with pytest.raises(RotaryExportError, match=f"^{re.escape(message)}$"):
        run_eager("plain", inputs)
    with pytest.raises(RotaryExportError, match=f"^{re.escape(message)}$"):
        load(get_bundle("plain"))(**inputs)


@ANY_PATH
def test_nan_and_inf_pass_as_in_eager(path):
    inputs = make_arrays("xpos")
    inputs["query"][0, 0, 0, :4] = NAN, INF, -INF, -0.0
    inputs["key"][2, 1, 3, -4:] = NAN, INF, -INF, -0.0  # the tail, which is copied
    outputs = load(get_bundle("xpos"), **PATHS[path])(**inputs)
    want = run_eager("xpos", inputs)
    for key, value in outputs.items():
        assert np.isnan(value).sum() > 0
        if path == "portable":
            assert (np.isnan(value) == np.isnan(want[key].numpy())).all()
        else:
            assert_same_bits(to_torch(value), want[key], key)
