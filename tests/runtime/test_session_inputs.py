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


IMAGE = TensorInfo("image", "float32", ("b", "8 * height", "past + height"))
ROWS = TensorInfo("rows", "float32", ("past",))
PATCHES = GraphInfo((IMAGE, ROWS), (X,), {"onnx": "model.onnx"}, min_size={"height": 2})


def check(image, past):
    feeds = {"image": np.zeros(image, np.float32), "rows": np.zeros(past, np.float32)}
    return check_session_inputs("model", PATCHES, feeds)


def test_multiples_and_sums_of_sizes():
    assert check((1, 16, 5), 3) == {"b": 1, "height": 2, "past": 3}
    for shape in ((1, 17, 5), (1, 16, 6), (1, 24, 5), (1, 16)):
        with pytest.raises(
            RotaryExportError, match=r"must have shape \(b, 8 \* height, past \+ he"
        ):
            check(shape, 3)


def test_a_smaller_size_is_refused():
    with pytest.raises(RotaryExportError, match="height must be >= 2, got 1"):
        check((1, 8, 4), 3)
