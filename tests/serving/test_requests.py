"""`ServedModel`: requests are checked one by one and run together; one that fails fails alone."""

import asyncio
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.bundles import get_bundle, make_arrays, make_folder, run_eager, to_numpy
from helpers.scaled_bundles import make_inputs as make_scaled_inputs
from helpers.scaled_bundles import make_rope as make_scaled_rope
from helpers.target_runs import (
    compare,
    get_model_allowed,
    get_model_bundle,
    make_model_arrays,
    run_model_eager,
)

import rotary_export
from rotary_export import RotaryExportError
from rotary_export.cli.main import cli
from rotary_export.serving.batcher import Batcher
from rotary_export.serving.core import ServedModel
from rotary_export.serving.ports import find_ports
from rotary_export.serving.size_limits import find_largest_body


def get_served(bundle="plain", **options):
    return ServedModel(get_bundle(bundle).path, **options)


def spoil(inputs):
    """Put in an id outside the tables."""
    ids = inputs["position_ids"].copy()
    ids[-1, -1] = 99
    return inputs | {"position_ids": ids}


def watch_runs(served, monkeypatch):
    """Return a list that gets the batch size of every run."""
    runs = []
    run = served._session._run

    def watched(inputs, *rest):
        runs.append(len(inputs["query"]))
        return run(inputs, *rest)

    monkeypatch.setattr(served._session, "_run", watched)
    return runs


def check_eager(name, requests, results):
    assert len(results) == len(requests)
    for inputs, outputs in zip(requests, results, strict=True):
        want = {key: to_numpy(value) for key, value in run_eager(name, inputs).items()}
        compare(outputs, want, 0)


# ---- together


def test_one_bad_request_fails_alone_and_the_others_run_together(monkeypatch):
    served = get_served()
    requests = [make_arrays("plain", batch=1 + seed % 3, seed=seed) for seed in range(16)]
    requests[11] = spoil(requests[11])
    runs = watch_runs(served, monkeypatch)
    results = served.run_many(requests)
    assert runs == [sum(len(r["query"]) for i, r in enumerate(requests) if i != 11)]
    bad = results.pop(11)
    assert isinstance(bad, RotaryExportError)
    row = len(requests[11]["query"]) - 1
    assert str(bad) == f"position_ids must be in [0, 32), got 99 at batch {row}, row 6"
    del requests[11]
    check_eager("plain", requests, results)


def test_only_equal_sizes_run_together(monkeypatch):
    served = get_served()
    sizes = [(1, 4), (2, 5), (1, 4), (1, 5), (2, 4)]
    requests = [make_arrays("plain", seq_len=s, batch=b, seed=i) for i, (b, s) in enumerate(sizes)]
    requests.append(make_arrays("plain", seq_len=4, heads=6))
    runs = watch_runs(served, monkeypatch)
    check_eager("plain", requests, served.run_many(requests))
    assert runs == [4, 3, 3]


def test_runs_have_at_most_n_rows(monkeypatch):
    served = get_served(max_batch_size=4)
    requests = [make_arrays("plain", batch=b, seed=b) for b in (3, 1, 1, 9, 2)]
    runs = watch_runs(served, monkeypatch)
    check_eager("plain", requests, served.run_many(requests))
    assert runs == [4, 1, 9, 2]


def test_requests_of_a_failed_run_run_one_by_one(monkeypatch):
    served = get_served()
    requests = [make_arrays("plain", batch=1, seed=seed) for seed in range(3)]
    run = served._session._run

    def fail(inputs, *rest):
        if (inputs["query"] == requests[1]["query"][0]).all((1, 2, 3)).any():
            raise RuntimeError("the second request")
        return run(inputs, *rest)

    monkeypatch.setattr(served._session, "_run", fail)
    first, second, third = served.run_many(requests)
    assert str(second) == "rotate failed: the second request"
    check_eager("plain", [requests[0], requests[2]], [first, third])


def test_a_whole_model():
    served = ServedModel(get_model_bundle().path)
    assert served.metadata["name"] == "llama"
    requests = [make_model_arrays(b, s) for b, s in ((1, 7), (2, 7), (1, 30))]
    requests.append(requests[0] | {"input_ids": requests[0]["input_ids"] + 90})
    *results, bad = served.run_many(requests)
    assert str(bad) == "input_ids must be >= 0 and <= max_input_ids = 95, got 96"
    allowed = get_model_allowed()
    for inputs, outputs in zip(requests, results, strict=False):
        compare(outputs, run_model_eager(inputs), allowed)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_requests_run_alone_where_the_longest_row_selects_the_angles(name):
    rope = make_scaled_rope(name)
    path = make_folder() / f"served-{name}"
    rotary_export.export(rope, path, max_seq_len=40, num_heads=4, num_kv_heads=2, formats=("onnx",))
    served = ServedModel(path)
    requests = [
        {key: value.numpy() for key, value in make_scaled_inputs(name, length).items()}
        for length in (8, 40)
    ]
    alone = [served.run_many([request])[0] for request in requests]
    for got, want in zip(served.run_many(requests), alone, strict=True):
        compare(got, want, 0)
    joined = {key: np.concatenate([r[key] for r in requests]) for key in requests[0]}
    (joined_outputs,) = served.run_many([joined])
    assert not np.array_equal(joined_outputs["query_out"][:3], alone[0]["query_out"])


def test_a_static_graph_runs_one_by_one():
    served = get_served("static")
    assert not served.batches
    assert served.metadata["inputs"][2] == {"name": "seq_len", "datatype": "INT64", "shape": []}
    requests = [make_arrays("static", seq_len=length) for length in (5, 32)]
    requests[0]["seq_len"] = served.interface.decode("seq_len", "INT64", [], [5])
    check_eager("static", requests, served.run_many(requests))


# ---- the protocol


def test_metadata():
    assert ServedModel(get_bundle("plain").path, name="other").metadata == {
        "name": "other",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "query", "datatype": "FP32", "shape": [-1, -1, -1, 24]},
            {"name": "key", "datatype": "FP32", "shape": [-1, -1, -1, 24]},
            {"name": "position_ids", "datatype": "INT64", "shape": [-1, -1]},
        ],
        "outputs": [
            {"name": "query_out", "datatype": "FP32", "shape": [-1, -1, -1, 24]},
            {"name": "key_out", "datatype": "FP32", "shape": [-1, -1, -1, 24]},
        ],
    }


def test_bfloat16_is_float32_on_the_wire():
    served = get_served("bfloat16")
    assert {t["datatype"] for t in served.metadata["outputs"]} == {"FP32"}
    inputs = make_arrays("bfloat16")
    wire = {
        key: served.interface.decode(key, "FP32", value.shape, value.astype(np.float32).tolist())
        for key, value in inputs.items()
        if key != "position_ids"
    }
    (outputs,) = served.run_many([inputs | wire])
    (want,) = served.run_many([inputs])
    for name, value in outputs.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, want[name])
    eager = {key: value.float().numpy() for key, value in run_eager("bfloat16", inputs).items()}
    compare(outputs, eager, 2**-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("q", "FP32", [1], [1]), "rotate has no input 'q'; it accepts query, key, position_ids"),
        (("query", "FP16", [1], [1]), "query must have the datatype FP32, got FP16"),
        (
            ("query", "FP32", [2, 2], [1, 2, 3]),
            "query must have 4 numbers for its shape (2, 2), got 3",
        ),
        (("query", "FP32", [-1], [1]), "query must have a shape without negatives, got (-1,)"),
        (("query", "FP32", [2**40] * 2, [1]), "must have 1208925819614629174706176 numbers"),
        (("query", "FP32", [1], [1e40]), "query must contain FP32 numbers, got 1e+40"),
        (("query", "FP32", [2], [[1], [1, 2]]), "query must contain FP32 numbers"),
        (("query", "FP32", [1], ["a"]), "query must contain FP32 numbers"),
        (("query", "FP32", [1], {"a": 1}), "query must contain FP32 numbers"),
        (("position_ids", "INT64", [1], [1.5]), "position_ids must contain INT64 numbers"),
        (("position_ids", "INT64", [1], [True]), "position_ids must contain INT64 numbers"),
        (("position_ids", "INT64", [1], [None]), "position_ids must contain INT64 numbers"),
        (("position_ids", "INT64", [1], [2**63]), "position_ids must contain INT64 numbers"),
        (("position_ids", "INT64", [1], [2**70]), "position_ids must contain INT64 numbers"),
    ],
)
def test_decode_refuses(call, message):
    with pytest.raises(RotaryExportError, match=re.escape(message)):
        get_served().interface.decode(*call)


def test_decode_accepts_nested_lists_arrays_and_no_numbers():
    served = get_served()
    flat, nested = [1, 2.5, None, 4], [[1, 2.5], [None, 4]]
    want = np.array([[1, 2.5], [np.nan, 4]], np.float32)
    for data in (flat, nested, want):
        np.testing.assert_array_equal(served.interface.decode("query", "FP32", [2, 2], data), want)
    assert served.interface.decode("position_ids", "INT64", [0, 3], []).shape == (0, 3)
    with pytest.raises(RotaryExportError, match="no output 'x'; it returns query_out, key_out"):
        served.interface.find_outputs(["x"])
    assert served.interface.find_outputs([]) == ["query_out", "key_out"]


@pytest.mark.parametrize("shape", [[1] * 69 + [24], [2**62, 0], [0, 7, 2**62, 24], [2**70, 0]])
def test_shapes_that_numpy_lacks(shape):
    with pytest.raises(
        RotaryExportError, match=re.escape("query must have the shape (batch_size, ")
    ):
        get_served().interface.decode("query", "FP32", shape, [0.0] * (24 if len(shape) > 4 else 0))


def test_the_largest_request_of_a_bundle():
    static = get_served("static")
    numbers = sum(np.prod(tensor["shape"], dtype=int) for tensor in static.metadata["inputs"])
    assert static.largest_request == numbers
    assert get_served().largest_request is None  # any number of heads
    model = ServedModel(get_model_bundle().path, max_batch_size=3)
    assert model.largest_request == 3 * 3 * 64  # inputs, rows, positions
    assert find_largest_body(576, None) == 576 * 32 + 2**16
    assert find_largest_body(10**9, None) == find_largest_body(None, None) == 64 * 2**20
    assert find_largest_body(576, 2) == 2 * 2**20


def test_requests_that_do_not_fit():
    served, good = get_served(), make_arrays("plain")
    missing = {key: value for key, value in good.items() if key != "key"}
    narrow = good | {"query": good["query"][..., :5]}
    errors = served.run_many([missing, narrow, good | {"x": good["key"]}, {}])
    for error, message in zip(
        errors,
        ("needs the input 'key'", "query must have shape", "no input 'x'", "needs the input"),
        strict=True,
    ):
        assert isinstance(error, RotaryExportError)
        assert message in str(error)


def test_torchscript_is_opened_only_where_allowed():
    with pytest.raises(RotaryExportError, match="--allow-code"):
        get_served(runtime="torchscript")
    with pytest.raises(RotaryExportError, match="runtime must be one of onnxruntime, torchscript"):
        get_served(runtime="program", allow_code=True)
    served = get_served(runtime="torchscript", allow_code=True)
    assert served.metadata["platform"] == "pytorch_torchscript"
    requests = [make_arrays("plain", seed=seed) for seed in range(2)]
    check_eager("plain", requests, served.run_many(requests))


# ---- adaptive batching


def run_together(served, requests, delay=0.0):
    """Send requests at once; return results, and the number of requests of each batch."""
    batches = []

    async def send():
        batcher = Batcher(served, batches.append, delay)
        calls = (batcher.run(request) for request in requests)
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(send()), batches


@pytest.mark.parametrize("delay", [0.0, 60.0])
def test_batcher_runs_waiting_requests_together(delay):
    served = get_served(max_batch_size=8)
    requests = [make_arrays("plain", batch=1, seed=seed) for seed in range(16)]
    requests[3] = spoil(requests[3])
    results, batches = run_together(served, requests, delay)  # full: it does not wait for 60 s
    assert batches == [8, 8]
    assert isinstance(results.pop(3), RotaryExportError)
    del requests[3]
    check_eager("plain", requests, results)


def test_batcher_continues_after_a_disconnect_and_after_a_bug(monkeypatch):
    served, request = get_served(), make_arrays("plain")

    async def leave():
        batcher = Batcher(served, lambda _: None)
        left = asyncio.create_task(batcher.run(request))
        stayed = asyncio.create_task(batcher.run(request))
        await asyncio.sleep(0)
        left.cancel()
        await stayed
        with monkeypatch.context() as patch:
            patch.setattr(served, "run_many", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await batcher.run(request)
        return await batcher.run(request)

    check_eager("plain", [request], [asyncio.run(asyncio.wait_for(leave(), 60))])


# ---- around it


def test_needs_no_torch():
    code = (
        "import sys; from rotary_export.serving.core import ServedModel; "
        "ServedModel(sys.argv[1]); assert not {'torch', 'onnx', 'onnxscript'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, get_bundle("plain").path], check=True)


def test_ports():
    first, second = find_ports("127.0.0.1", 0, 0)
    assert first != second
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RotaryExportError, match=f"needs a free port, got 127.0.0.1:{port}"):
            find_ports("127.0.0.1", 0, port)


def test_without_the_extra_the_command_names_what_to_install():
    result = CliRunner().invoke(cli, ["serve", str(get_bundle("plain").path)])
    assert result.exit_code == 2
    assert "serve needs mlserver: pip install '.[serve]' in the checkout" in result.stderr
