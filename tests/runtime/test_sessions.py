"""Sessions: numpy and torch in and out, in every runtime, and truthful about what runs."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.bundles import (
    EXACT_PATHS,
    PATHS,
    PORTABLE,
    ROWS,
    SPECS,
    copy_bundle,
    edit_manifest,
    get_bundle,
    make_arrays,
    make_rope,
    make_tensors,
    read_tree,
    run_eager,
    to_torch,
)
from helpers.oracles import assert_same_bits

from rotary_export import RotaryExportError, load
from rotary_export.op import library as op_library
from rotary_export.runtime import ort

ALL_PATHS = pytest.mark.parametrize("path", PATHS)
EVERY = [
    (name, path)
    for name, path in itertools.product(SPECS, PATHS)
    if path in ("fused", "portable") or "formats" not in SPECS[name][1]
]
KINDS = pytest.mark.parametrize("make", [make_arrays, make_tensors], ids=["numpy", "torch"])
# Portable, the kernel is ONNX Runtime's own; proof.tolerances.TOLERANCES says why so much.
CLOSE = {"float32": 10 * 2**-23, "float16": 2**-10, "bfloat16": 2**-7, "float64": 0}


def check_outputs(name, path, inputs, got):
    """Compare with eager: bits, or portable, ulp of the largest value of a head vector."""
    assert list(got) == ["query_out", "key_out"]
    for key, want in run_eager(name, inputs).items():
        value = to_torch(got[key])
        dtype = str(want.dtype).removeprefix("torch.")
        if path != "portable" or not CLOSE[dtype]:
            assert_same_bits(value, want, (name, path, key))
            continue
        assert (value.dtype, value.shape) == (want.dtype, want.shape)
        off = (value.double() - want.double()).abs()
        largest = want.double().abs().amax(-1, keepdim=True)
        assert (off <= CLOSE[dtype] * largest).all(), (name, path, key)


@KINDS
@pytest.mark.parametrize(("name", "path"), EVERY)
def test_equal_to_eager_at_sizes_that_were_not_traced(name, path, make):
    session = load(get_bundle(name), **PATHS[path])
    for seq_len, batch in ((1, 1), (9, 3), (ROWS, 1)):
        inputs = make(name, seq_len=seq_len, batch=batch, seed=seq_len)
        kept = {key: to_torch(value).clone() for key, value in inputs.items()}
        outputs = session(**inputs)
        wanted = torch.Tensor if make is make_tensors else np.ndarray
        assert {type(value) for value in outputs.values()} == {wanted}
        check_outputs(name, path, inputs, outputs)
        for key, value in kept.items():
            assert_same_bits(to_torch(inputs[key]), value, f"{key} was changed")


@ALL_PATHS
def test_head_counts_are_free_where_they_were_left_open(path):
    session = load(get_bundle("plain"), **PATHS[path])
    for heads in (1, 2, 11):
        inputs = make_tensors("plain", heads=heads)
        check_outputs("plain", path, inputs, session(**inputs))


@KINDS
@ALL_PATHS
@pytest.mark.parametrize("name", ["plain", "float64", "bfloat16"])
def test_empty_inputs_give_empty_outputs(name, path, make):
    session = load(get_bundle(name), **PATHS[path])
    for batch, seq_len in ((0, 5), (2, 0), (0, 0)):
        inputs = make(name, batch=batch, seq_len=seq_len)
        check_outputs(name, path, inputs, session(**inputs))


@ALL_PATHS
def test_a_seq_len_of_any_kind(path):
    arguments = {k: v for k, v in PATHS[path].items() if k != "require_fused"}
    session = load(get_bundle("xpos"), "tables", **arguments)
    for length in (0, 1, 9, ROWS):
        freqs, scale = make_rope("xpos")(torch.tensor(length))
        for given in (length, np.int64(length), np.array(length), torch.tensor(length)):
            got = session(seq_len=given)
            assert torch.is_tensor(got["freqs"]) == torch.is_tensor(given)
            assert_same_bits(to_torch(got["freqs"]), freqs, (length, type(given)))
            torch.testing.assert_close(to_torch(got["scale"]), scale, rtol=2**-22, atol=0)
    inputs = make_tensors("static")
    inputs["seq_len"] = 7  # an int beside tensors
    outputs = load(get_bundle("static"), **PATHS[path])(**inputs)
    inputs["seq_len"] = torch.tensor(7)
    check_outputs("static", path, inputs, outputs)


# ---- memory


@ALL_PATHS
def test_any_memory_layout(path):
    session = load(get_bundle("plain"), **PATHS[path])
    inputs = make_tensors("plain", batch=4, seq_len=4)
    views = {
        "transposed": lambda x: x.transpose(0, -2),
        "every-second": lambda x: x.repeat_interleave(2, 0)[::2],
        "expanded": lambda x: x[:1].expand(4, *x.shape[1:]),
        "offset": lambda x: torch.cat((x[:1], x))[1:],
    }
    for change in views.values():
        changed = {key: change(value) for key, value in inputs.items()}
        for given in (changed, {key: value.numpy() for key, value in changed.items()}):
            check_outputs("plain", path, changed, session(**given))
    arrays = make_arrays("plain")
    arrays["query"] = arrays["query"][:, ::-1]
    arrays["key"] = np.asfortranarray(arrays["key"])
    arrays["position_ids"].flags.writeable = False
    contiguous = {key: np.ascontiguousarray(value).copy() for key, value in arrays.items()}
    check_outputs("plain", path, contiguous, session(**arrays))


@ALL_PATHS
def test_a_parameter_is_an_input_and_gets_no_graph(path):
    inputs = make_tensors("plain")
    want = run_eager("plain", inputs)
    inputs["query"] = torch.nn.Parameter(inputs["query"])
    inputs["key"] = inputs["key"].requires_grad_() * 1
    outputs = load(get_bundle("plain"), **PATHS[path])(**inputs)
    assert not any(value.requires_grad for value in outputs.values())
    torch.testing.assert_close(outputs, want, rtol=1e-6, atol=1e-6)


@KINDS
def test_onnx_runtime_reads_and_writes_tensors_where_they_are(make, monkeypatch):
    bound, describe = [], ort._describe

    def spy(buffer):
        bound.append(describe(buffer)[-1])
        return describe(buffer)

    monkeypatch.setattr(ort, "_describe", spy)
    inputs = make("plain")
    outputs = load(get_bundle("plain"))(**inputs)
    held = [*inputs.values(), *outputs.values()]
    assert bound == [v.data_ptr() if torch.is_tensor(v) else v.ctypes.data for v in held]


@KINDS
@ALL_PATHS
@pytest.mark.parametrize("graph", ["tables", "rotate"])
def test_outputs_are_the_callers(path, make, graph):
    arguments = {k: v for k, v in PATHS[path].items() if k != "require_fused"}
    session = load(get_bundle("plain"), graph, **arguments)
    inputs = make("plain")
    if graph == "tables":
        inputs = {"seq_len": inputs["position_ids"][0, 0]}  # a numpy scalar, if not a tensor
    kept = {
        key: value.copy() if make is make_arrays else value.clone() for key, value in inputs.items()
    }
    first = session(**inputs)
    copies = {key: to_torch(value).clone() for key, value in first.items()}
    for value in first.values():
        value[...] = -7  # neither an input nor a constant of the graph
    second = session(**inputs)
    for key, value in second.items():
        assert_same_bits(to_torch(value), copies[key], key)
        assert not bool((first[key] != -7).any())
    assert all((inputs[key] == value).all() for key, value in kept.items())


@ALL_PATHS
def test_one_session_from_many_threads(path):
    session = load(get_bundle("xpos"), **PATHS[path])
    inputs = [make_tensors("xpos", batch=8, seq_len=ROWS, seed=seed) for seed in range(4)]
    wants = [session(**given) for given in inputs]

    def run(index):
        got = session(**inputs[index % 4])
        return all(torch.equal(got[key], value) for key, value in wants[index % 4].items())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(40)))


# ---- what runs


def read_optimised_ops(file, folder, library):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    if library:
        options.register_custom_ops_library(str(op_library.op_library_path()))
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    return [f"{node.domain}::{node.op_type}" for node in nodes]


@pytest.mark.parametrize("use_op_library", ["auto", True, False])
@pytest.mark.parametrize("name", SPECS)
def test_kernel_path_is_what_onnx_runtime_runs(name, use_op_library, tmp_path):
    session = load(get_bundle(name), use_op_library=use_op_library)
    ops = read_optimised_ops(
        get_bundle(name).path / "rotate.onnx", tmp_path, use_op_library is not False
    )
    counts = ops.count("rotary_export::RotaryEmbedding"), ops.count("::RotaryEmbedding")
    wanted = {
        f"fused ({op_library.instruction_set()})": (1, 0),
        "native": (0, 2),
        "primitive": (0, 0),
    }
    assert wanted[session.kernel_path] == counts
    assert session.kernel_path.startswith("fused") == (use_op_library is not False)
    assert session.providers == ("CPUExecutionProvider",)
    assert repr(session) == (f"<OrtSession rotate on CPUExecutionProvider: {session.kernel_path}>")


def test_the_graph_that_is_opened_without_a_name(tmp_path):
    assert load(get_bundle("plain")).graph_name == "rotate"
    bundle = copy_bundle("plain", tmp_path)
    rotate = json.loads((bundle / "manifest.json").read_text())["graphs"]["rotate"]
    edit_manifest(bundle, graphs={"turn": rotate})
    assert load(bundle).graph_name == "turn"
    edit_manifest(bundle, graphs={"turn": rotate, "back": rotate})
    wanted = "has no graph 'rotate' or 'model'; it has turn, back"
    with pytest.raises(RotaryExportError, match=wanted):
        load(bundle)


def test_other_kernel_paths():
    assert load(get_bundle("plain"), **PORTABLE).kernel_path == "native"
    assert load(get_bundle("opset18"), **PORTABLE).kernel_path == "primitive"
    assert load(get_bundle("float64"), **PORTABLE).kernel_path == "primitive"
    assert load(get_bundle("plain"), "tables").kernel_path == "primitive"
    for runtime in ("torchscript", "program"):
        session = load(get_bundle("plain"), runtime=runtime, allow_code=True)
        assert (session.kernel_path, session.providers) == ("primitive", ("CPU (torch)",))


REFUSALS = {
    "switched off": ({"use_op_library": False}, r"require_fused: .* switched off"),
    "tables": ({"graph": "tables"}, "require_fused: the graph 'tables' has no rotary node"),
    "torchscript": (
        {"runtime": "torchscript", "allow_code": True},
        "require_fused: the runtime 'torchscript' has no",
    ),
    "program": (
        {"runtime": "program", "allow_code": True},
        "require_fused: the runtime 'program' has no",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_require_fused_raises_rather_than_falls_back(refusal):
    arguments, message = REFUSALS[refusal]
    with pytest.raises(RotaryExportError, match=message):
        load(get_bundle("plain"), require_fused=True, **arguments)


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(op_library, "package_folders", lambda: [tmp_path])
    assert load(get_bundle("plain")).kernel_path == "native"
    for arguments in ({"require_fused": True}, {"use_op_library": True}):
        asked = re.escape(next(iter(arguments))) + ".*librotary_export.so must be"
        with pytest.raises(RotaryExportError, match=asked):
            load(get_bundle("plain"), **arguments)


def test_onnx_runtime_opens_the_onnx_file_alone(tmp_path):
    bundle = copy_bundle("plain", tmp_path)
    for file in list(bundle.iterdir()):
        if file.suffix in (".pt", ".pt2"):
            file.unlink()
    (bundle / "tables.onnx").write_bytes(b"")  # not the graph that is loaded
    code = (
        "import sys, numpy as np, rotary_export.runtime as r\n"
        f"session = r.load({str(bundle)!r})\n"
        "x = np.ones((1, 2, 3, 24), np.float32)\n"
        "session(query=x, key=x, position_ids=np.zeros((1, 3), np.int64))\n"
        "print([n for n in ('torch', 'onnx', 'onnxscript', 'ml_dtypes') if n in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
    assert len(read_tree(bundle)) == 3


@pytest.mark.parametrize("name", ["xpos", "static"])
def test_all_runtimes_agree_to_the_bit(name):
    inputs = make_arrays(name, seq_len=11)
    outputs = {path: load(get_bundle(name), **PATHS[path])(**inputs) for path in EXACT_PATHS}
    for path in EXACT_PATHS[1:]:
        for key, value in outputs[path].items():
            assert value.tobytes() == outputs["fused"][key].tobytes(), (path, key)
