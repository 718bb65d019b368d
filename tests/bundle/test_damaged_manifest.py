"""A manifest that is not what it should be: one clear error, wherever it is read."""

import json

import numpy as np
import pytest
from helpers.bundles import check_refused, copy_bundle, edit_manifest, get_bundle, make_arrays

from rotary_export import RotaryExportError, load, verify
from rotary_export.bundle.dims import read_terms
from rotary_export.bundle.json_file import MAX_BYTES, read_json
from rotary_export.bundle.manifest import read_manifest
from rotary_export.cli.inspection import inspect_path
from rotary_export.measure.benchmark import bench_bundle


def edit(change):
    def apply(text):
        manifest = json.loads(text)
        change(manifest)
        return json.dumps(manifest).replace('"HUGE"', "1e999")

    return apply


def edit_output(**changes):
    return edit(lambda m: m["graphs"]["rotate"]["outputs"][0].update(changes))


OUTPUT = "graphs.rotate.outputs[0]"
# What is wrong: how the text is changed, and the message.
DAMAGED = {
    "200,000 deep": (lambda text: "[" * 200_000 + text, "manifest.json must be nested at most 64"),
    "100 deep": (
        edit(lambda m: m.update(parity={"a": json.loads("[" * 100 + "]" * 100)})),
        "manifest.json must be nested at most 64 deep",
    ),
    "1e999": (
        edit(lambda m: m.update(opset="HUGE")),
        "manifest.json is not valid JSON: 1e999 is not a finite number",
    ),
    "NaN": (
        edit(lambda m: m["config"]["embedding"].update(base=float("nan"))),
        "manifest.json is not valid JSON: NaN is not a finite number",
    ),
    "5,000 digits": (lambda text: text.replace("23,", "9" * 5000 + ",", 1), "is not valid JSON"),
    "opset text": (edit(lambda m: m.update(opset="23")), "opset must be an integer >= 0, got '23'"),
    "opset true": (edit(lambda m: m.update(opset=True)), "opset must be an integer >= 0, got True"),
    "opset 2**63": (
        edit(lambda m: m.update(opset=2**63)),
        f"opset must be an integer >= 0, got {2**63}",
    ),
    "name": (edit(lambda m: m.update(name=["a"])), "name must be a string, got ['a']"),
    "file": (edit(lambda m: m["files"].update({"rotate.onnx": 3})), "files.rotate.onnx must be a"),
    "dtype": (edit_output(dtype="nan"), f"{OUTPUT}.dtype must be one of bfloat16, bool,"),
    "shape": (
        edit_output(shape=[{}]),
        f"{OUTPUT}.shape[0] must be an integer >= 0 or a string, got",
    ),
    "negative": (edit_output(shape=[-1]), f"{OUTPUT}.shape[0] must be an integer >= 0 or a string"),
    "limits": (edit_output(limits=3), f"{OUTPUT}.limits must be null or a list, got 3"),
    "no name": (
        edit(lambda m: m["graphs"]["rotate"]["outputs"][0].pop("name")),
        f"{OUTPUT} has no 'name'",
    ),
    "no outputs": (
        edit(lambda m: m["graphs"]["rotate"].update(outputs=[])),
        "inputs and outputs must have different names, got []",
    ),
    "twice": (
        edit(lambda m: m["graphs"]["rotate"]["inputs"][1].update(name="query")),
        "inputs and outputs must have different names, got ['query', 'query', 'position_ids']",
    ),
    "parity": (edit(lambda m: m.update(parity={"passed": "no"})), "parity.passed must be true or"),
    "config": (
        edit(lambda m: m["config"].update(max_seq_len="32")),
        "config.max_seq_len must be an integer >= 0, got '32'",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_manifest_is_one_error(what, tmp_path):
    change, message = DAMAGED[what]
    bundle = copy_bundle("plain", tmp_path)
    file = bundle / "manifest.json"
    file.write_text(change(file.read_text()))
    for act in (load, verify, inspect_path, bench_bundle):
        check_refused(message, lambda act=act: act(bundle), tmp_path)


def test_a_manifest_of_great_size_is_not_read(tmp_path):
    bundle = copy_bundle("plain", tmp_path)
    with (bundle / "manifest.json").open("ab") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(
        RotaryExportError, match=rf"must be <= {MAX_BYTES} bytes, got {MAX_BYTES + 1}"
    ):
        read_manifest(bundle)


def test_other_json_may_contain_infinity(tmp_path):
    """As the config.json of some models does."""
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "config.json") == {"time_step_limit": [0.0, float("inf")]}


# Inputs and outputs that are not the file's.
UNLIKE = {
    "name": ({"name": "other"}, "rotate.onnx has the outputs query_out, key_out, the manifest has"),
    "dtype": (
        {"dtype": "float16"},
        "rotate.onnx has the outputs query_out: float32(batch_size, num_heads, seq_len, 24), the "
        "manifest has float16(batch_size, num_heads, seq_len, 24) for rotate",
    ),
    "size": (
        {"shape": ["batch_size", "num_heads", "seq_len", 25]},
        "the manifest has float32(batch_size, num_heads, seq_len, 25) for rotate",
    ),
    "rank": (
        {"shape": ["batch_size", "seq_len", 24]},
        "the manifest has float32(batch_size, seq_len, 24) for rotate",
    ),
}


@pytest.mark.parametrize("what", UNLIKE)
@pytest.mark.parametrize("kind", ["outputs", "inputs"])
def test_tensors_are_those_of_the_file(what, kind, tmp_path):
    changes, message = UNLIKE[what]
    bundle = copy_bundle("plain", tmp_path)
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    graphs["rotate"][kind][0] |= changes
    edit_manifest(bundle, graphs=graphs)
    if kind == "inputs":
        message = message.replace("outputs query_out, key_out", "inputs query, key, position_ids")
        message = message.replace("outputs query_out", "inputs query")
    check_refused(message, lambda: load(bundle), tmp_path)


def test_an_output_that_does_not_fit_into_memory_is_an_error(tmp_path):
    bundle = copy_bundle("plain", tmp_path)
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    graphs["rotate"]["outputs"][0]["shape"][0] = "999999999999999999 * batch_size"
    edit_manifest(bundle, graphs=graphs)
    session = load(bundle)
    with pytest.raises(RotaryExportError, match=r"^query_out of shape .* can't be allocated: "):
        session(**make_arrays("plain"))


def test_tables_of_another_length_are_refused_before_they_are_made(tmp_path):
    bundle = copy_bundle("plain", tmp_path)
    config = json.loads((bundle / "manifest.json").read_text())["config"]
    edit_manifest(bundle, config=config | {"max_seq_len": 10**12})
    check_refused("graph 'tables' is not of its config", lambda: verify(bundle), tmp_path)


def test_terms_of_sizes():
    assert read_terms("4 * n + 12") == [(4, "n"), (12, "")]
    for strange in ("0 * n", "¼", "9" * 5000, "3 * ", " * n"):
        assert read_terms(strange) == [(1, strange)]


def test_the_schema_takes_what_is_exported():
    for name in ("plain", "static", "xpos", "float16"):
        assert read_manifest(get_bundle(name).path).to_json() == get_bundle(name).manifest.to_json()
        assert np.isfinite(read_manifest(get_bundle(name).path).opset)
