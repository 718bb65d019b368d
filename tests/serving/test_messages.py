"""The protocol's messages: read to arrays and written from arrays, without a server."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.bundles import get_bundle, make_arrays
from helpers.http_calls import make_binary_body, make_body

from rotary_export import RotaryExportError
from rotary_export.serving.core import ServedModel
from rotary_export.serving.messages import InferCall, read_grpc, read_http, write_http
from rotary_export.serving.options import ModelOptions
from rotary_export.serving.ports import Addresses


@pytest.fixture(scope="module")
def served():
    return ServedModel(get_bundle("plain").path)


@pytest.fixture
def interface(served):
    return served.interface


@pytest.fixture
def inputs():
    return make_arrays("plain", batch=2, seq_len=3)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_array_equal(got[name], value)


# ---- HTTP


def test_json_is_read(interface, inputs):
    call = read_http(interface, make_body(inputs), None)
    assert_same(call.inputs, inputs)
    assert (call.outputs, call.binary, call.id) == ({}, False, "")


def test_binary_tensors_are_read(interface, inputs):
    header, tensors = make_binary_body(inputs)
    call = read_http(interface, header + tensors, str(len(header)))
    assert_same(call.inputs, inputs)
    assert call.binary


def test_outputs_and_id_are_read(interface, inputs):
    body = json.loads(make_body(inputs))
    body["id"] = "seven"
    body["outputs"] = [
        {"name": "key_out", "parameters": {"binary_data": True}},
        {"name": "query_out"},
    ]
    call = read_http(interface, json.dumps(body).encode(), None)
    assert (call.outputs, call.id) == ({"key_out": True, "query_out": False}, "seven")
    body["outputs"] = [{"name": "x"}]
    with pytest.raises(RotaryExportError, match="no output 'x'"):
        read_http(interface, json.dumps(body).encode(), None)


@pytest.mark.parametrize(
    ("change", "length", "message"),
    [
        (lambda h, t: (h, t), "9999999", "must be a number <= the size of the body"),
        (lambda h, t: (h, t), "x", "must be a number <= the size of the body"),
        (lambda h, t: (h, t[:-1]), None, "binary_data_size must be >= 0 and <= the"),
        (lambda h, t: (h, t + b"x"), None, "the body has 1 bytes after its inputs"),
        (lambda h, t: (h[:20], b""), None, "the body must be JSON"),
        (lambda h, t: (b"[]", b""), None, "the request must be an object, got list"),
        (lambda h, t: (b"{}", b""), None, "must have 'inputs', a list, got nothing"),
        (lambda h, t: (b"[" * 100_000, b""), None, "must be JSON: it is nested too deep"),
        (lambda h, t: (h.replace(b"FP32", b"FP64"), t), None, "query must have the datatype FP32"),
        (lambda h, t: (h.replace(b'"key"', b'"query"'), t), None, "'query' must be given once"),
    ],
)
def test_malformed_bodies(change, length, message, interface, inputs):
    header, tensors = change(*make_binary_body(inputs))
    with pytest.raises(RotaryExportError, match=re.escape(message)):
        read_http(interface, header + tensors, str(len(header)) if length is None else length)


def read_answer(content, headers):
    """Return the JSON of an answer, and its binary tensors by name."""
    size = int(headers.get("Inference-Header-Content-Length", len(content)))
    answer, rest, tensors = json.loads(content[:size]), content[size:], {}
    for output in answer["outputs"]:
        if (count := output.get("parameters", {}).get("binary_data_size")) is not None:
            tensors[output["name"]] = np.frombuffer(rest[:count], "<f4").reshape(output["shape"])
            rest = rest[count:]
    assert not rest
    return answer, tensors


def test_answers_are_json_or_binary(served, interface, inputs):
    (outputs,) = served.run_many([inputs])
    answer, _ = read_answer(*write_http(interface, InferCall(inputs, id="5"), outputs))
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("plain", "1", "5")
    for output in answer["outputs"]:
        got = np.array(output["data"], np.float32).reshape(output["shape"])
        np.testing.assert_array_equal(got, outputs[output["name"]])
    _, tensors = read_answer(*write_http(interface, InferCall(inputs, binary=True), outputs))
    assert_same(tensors, outputs)
    named = InferCall(inputs, {"key_out": True, "query_out": False})
    answer, tensors = read_answer(*write_http(interface, named, outputs))
    assert [output["name"] for output in answer["outputs"]] == ["key_out", "query_out"]
    assert_same(tensors, {"key_out": outputs["key_out"]})


def test_json_has_null_for_nan_and_no_infinity(interface, inputs):
    outputs = {"query_out": np.array([1, np.nan], np.float32)}
    answer, _ = read_answer(*write_http(interface, InferCall(inputs), outputs))
    assert answer["outputs"][0]["data"] == [1, None]
    outputs["query_out"][0] = np.inf
    with pytest.raises(RotaryExportError, match="query_out must be finite for JSON, got inf"):
        write_http(interface, InferCall(inputs), outputs)
    _, tensors = read_answer(*write_http(interface, InferCall(inputs, binary=True), outputs))
    np.testing.assert_array_equal(tensors["query_out"], outputs["query_out"])


def test_a_float32_is_the_same_for_clients_that_read_float64(interface, inputs):
    outputs = {"query_out": np.array([7.038531e-26], np.float32)}  # its shortest text is not
    answer, _ = read_answer(*write_http(interface, InferCall(inputs), outputs))
    assert np.float32(np.float64(answer["outputs"][0]["data"][0])) == outputs["query_out"][0]


def test_many_small_lists_are_refused(interface):
    body = b'{"inputs": [' + b"[]," * 2**20 + b"0]}"
    with pytest.raises(RotaryExportError, match="at most 1048576 lists, objects and strings"):
        read_http(interface, body, None)


# ---- gRPC


def make_request(inputs, raw):
    """Make what tritonclient's ModelInferRequest looks like."""
    fields = {"FP32": "fp32_contents", "INT64": "int64_contents"}
    tensors = []
    for name, value in inputs.items():
        datatype = "INT64" if value.dtype == np.int64 else "FP32"
        contents = SimpleNamespace(**{fields[datatype]: value.ravel().tolist()})
        tensors.append(
            SimpleNamespace(name=name, datatype=datatype, shape=value.shape, contents=contents)
        )
    raws = [value.tobytes() for value in inputs.values()] if raw else []
    return SimpleNamespace(id="3", inputs=tensors, outputs=[], raw_input_contents=raws)


@pytest.mark.parametrize("raw", [True, False])
def test_grpc_tensors_are_read(raw, interface, inputs):
    call = read_grpc(interface, make_request(inputs, raw))
    assert_same(call.inputs, inputs)
    assert call.id == "3"


def test_malformed_grpc_tensors(interface, inputs):
    request = make_request(inputs, raw=True)
    request.raw_input_contents.pop()
    with pytest.raises(RotaryExportError, match="one item for each of 3 inputs, or none"):
        read_grpc(interface, request)
    request = make_request(inputs, raw=True)
    request.raw_input_contents[0] = b"123"
    with pytest.raises(RotaryExportError, match="FP32 numbers of 4 bytes each, got 3 bytes"):
        read_grpc(interface, request)
    request = make_request(inputs, raw=True)
    request.inputs[1].name = "query"
    with pytest.raises(RotaryExportError, match="'query' must be given once, got it twice"):
        read_grpc(interface, request)


# ---- options and addresses


def test_options_of_the_model_reach_it():
    options = ModelOptions(name="other", graph="rotate", max_batch_size=3, max_batch_delay_ms=250)
    assert ModelOptions(**options.to_arguments()) == options
    served = options.open_bundle(get_bundle("plain").path)
    assert (served.metadata["name"], served.max_batch_size) == ("other", 3)
    batcher = options.make_batcher(served, lambda _: None)
    assert batcher._delay == 0.25
    with pytest.raises(RotaryExportError, match="--allow-code"):
        ModelOptions(runtime="torchscript").open_bundle(get_bundle("plain").path)


def test_addresses_are_urls():
    line = Addresses("127.0.0.1", 1, 2, 3).describe("plain", "fused (avx2)")
    assert line == (
        "serving plain (fused (avx2)) on http://127.0.0.1:1, grpc://127.0.0.1:2, "
        "metrics http://127.0.0.1:3/metrics"
    )
    line = Addresses("::1", 1, 2, 3).describe("plain", "native", metrics_host="127.0.0.1")
    assert "http://[::1]:1, grpc://[::1]:2, metrics http://127.0.0.1:3/metrics" in line
