"""An ONNX file that is written weight by weight is the file that onnx would write."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

from rotary_export.exporters.onnx_file import take_weights, write_model


def make_model(*arrays):
    tensors = [numpy_helper.from_array(array, f"w{index}") for index, array in enumerate(arrays)]
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def test_the_file_contains_every_weight(tmp_path):
    rng = np.random.default_rng(0)
    large = rng.standard_normal((300, 200), np.float32)
    arrays = [np.arange(3.0, dtype=np.float32), large, large.astype(ml_dtypes.bfloat16)]
    source = make_model(*arrays)
    model = ir.serde.deserialize_model(source)
    weights = take_weights(model)
    assert [weight.name for weight in weights] == ["w1", "w2"]
    proto = ir.serde.serialize_model(model)
    assert [value.name for value in proto.graph.input] == ["x", "w1", "w2"]
    write_model(proto, weights, tmp_path / "m.onnx")
    read = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(read, full_check=True)
    assert [value.name for value in read.graph.input] == ["x"]
    assert read.graph.node == source.graph.node
    found = {tensor.name: tensor for tensor in read.graph.initializer}
    for tensor in source.graph.initializer:
        assert found[tensor.name].data_type == tensor.data_type
        got, want = (numpy_helper.to_array(t) for t in (found[tensor.name], tensor))
        assert np.array_equal(got.view(np.uint8), want.view(np.uint8))
    # One message, as readers that don't merge fields need it.
    assert (tmp_path / "m.onnx").read_bytes().count(b"Identity") == 1
    assert read.SerializeToString() is not None
    assert len(read.SerializeToString()) == (tmp_path / "m.onnx").stat().st_size
