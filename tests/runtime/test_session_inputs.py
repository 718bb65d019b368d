"""The sizes of a session's inputs against the limits of its graph."""

import numpy as np
import pytest

from rotary_export import RotaryExportError
from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.runtime.session import check_session_inputs

X = TensorInfo("x", "float32", ("batch_size", "seq_len"))
GRAPH = GraphInfo((X,), (X,), {"onnx": "model.onnx"}, max_size={"seq_len": 7})


@pytest.mark.parametrize("length", [0, 6, 7])
def test_a_size_up_to_the_largest_is_accepted(length):
    sizes = check_session_inputs("model", GRAPH, {"x": np.zeros((2, length), np.float32)})
    assert sizes == {"batch_size": 2, "seq_len": length}


@pytest.mark.parametrize("length", [8, 9])
def test_a_larger_size_is_refused(length):
    with pytest.raises(RotaryExportError, match=f"seq_len must be <= 7, got {length}"):
        check_session_inputs("model", GRAPH, {"x": np.zeros((2, length), np.float32)})
