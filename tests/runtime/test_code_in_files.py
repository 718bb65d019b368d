"""Files of torch are code: opened on request alone, and refused where that needs no running."""

import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from click.testing import CliRunner
from helpers.bundles import check_refused, copy_bundle, get_bundle, update_hash

from rotary_export import RotaryExportError, export, load, verify
from rotary_export.bundle.manifest import read_manifest
from rotary_export.cli.main import cli
from rotary_export.deploy.deploy import deploy
from rotary_export.measure.benchmark import bench_bundle
from rotary_export.runtime.ways import NOT_OPENED, PROGRAM, TORCHSCRIPT

TORCH = {PROGRAM.name: NOT_OPENED, TORCHSCRIPT.name: NOT_OPENED}


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def save(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def edit_config(content, **changes):
    config = json.loads(content)
    name = next(iter(config["config"]))
    config["config"][name] |= changes
    return json.dumps(config).encode()


# What is added to rotate.pt2 or changed in it: name, content from the old one, and the message.
CODE = {
    "example inputs": (
        "data/sample_inputs/model.pt",
        lambda old, code: save(code),
        "rotate.pt2 contains example inputs, a pickle that would run; it was not opened",
    ),
    "a pickled constant": (
        "data/constants/model_constants_config.json",
        lambda old, code: edit_config(old, use_pickle=True),
        "rotate.pt2 contains 'cos_cache' as a pickle, which would run; it was not opened",
    ),
    "a constant that is an object": (
        "data/constants/model_constants_config.json",
        lambda old, code: edit_config(old, path_name="opaque_obj_0"),
        "rotate.pt2 contains 'cos_cache' as a pickle, which would run; it was not opened",
    ),
    "an object": (
        "data/constants/opaque_obj_0",
        lambda old, code: pickle.dumps(code),
        "rotate.pt2 contains 'data/constants/opaque_obj_0', which no file of this package has",
    ),
    "older weights": (
        "data/weights/model.pt",
        lambda old, code: save(code),
        "rotate.pt2 contains 'data/weights/model.pt', which no file of this package has",
    ),
    "a library": (
        "data/aotinductor/model/a.so",
        lambda old, code: b"\x7fELF",
        "rotate.pt2 contains 'data/aotinductor/model/a.so', which no file of this package has",
    ),
    "an extra file": (
        "extra/\x1b[31mred",
        lambda old, code: b"",
        r"rotate.pt2 contains 'extra/\x1b[31mred', which no file of this package has",
    ),
}


def rewrite(file, change):
    """Write a zip again; `change` returns the contents of a name, from the old one or None."""
    content = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(content, "w") as new:
        for name, data in change({name: old.read(name) for name in old.namelist()}):
            new.writestr(name, data)
    file.write_bytes(content.getvalue())
    update_hash(file.parent, file.name)


@pytest.mark.parametrize("what", CODE)
def test_code_is_refused_before_it_runs(what, tmp_path):
    name, make, message = CODE[what]
    bundle, mark = copy_bundle("plain", tmp_path), tmp_path / "mark"

    def change(contents):
        whole = f"rotate/{name}"
        return (contents | {whole: make(contents.get(whole), Code(mark))}).items()

    rewrite(bundle / "rotate.pt2", change)
    check_refused(message, lambda: load(bundle, runtime="program", allow_code=True), tmp_path)
    check_refused(message, lambda: verify(bundle, allow_code=True), tmp_path)
    assert not mark.exists()
    assert verify(bundle).passed


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    bundle = copy_bundle("plain", tmp_path)

    def change(contents):
        return [*contents.items(), ("rotate/data/sample_inputs/model.pt", b"")]

    with pytest.warns(UserWarning, match="Duplicate name"):
        rewrite(bundle / "rotate.pt2", change)
    message = "rotate.pt2 contains 'data/sample_inputs/model.pt', which no file"
    check_refused(message, lambda: load(bundle, runtime="program", allow_code=True), tmp_path)


def test_torchscript_with_more_in_it_is_refused(tmp_path):
    bundle = copy_bundle("plain", tmp_path)
    rewrite(bundle / "rotate.pt", lambda contents: (contents | {"rotate/extra/x": b""}).items())
    message = "rotate.pt contains 'extra/x', which no file of this package has; it was not opened"
    check_refused(message, lambda: load(bundle, runtime="torchscript", allow_code=True), tmp_path)


@pytest.mark.parametrize(
    ("runtime", "file"), [("torchscript", "rotate.pt"), ("program", "rotate.pt2")]
)
def test_load_opens_code_only_where_it_is_allowed(runtime, file):
    message = f"the runtime '{runtime}' opens {file}, whose code may run here: allow_code=True "
    with pytest.raises(RotaryExportError) as raised:
        load(get_bundle("plain"), runtime=runtime)
    assert str(raised.value).startswith(message)
    assert "(--allow-code)" in str(raised.value)


def refuse(*_):
    raise AssertionError("a file of torch was opened")


def test_what_may_run_is_listed_as_not_opened(monkeypatch):
    for loader in ("torch.jit.load", "torch.export.load", "torch._C.PyTorchFileReader"):
        monkeypatch.setattr(loader, refuse)
    bundle = get_bundle("plain").path
    report = verify(bundle)
    assert report.passed
    assert report.skipped == TORCH
    assert {row.runtime for row in report.rows if row.graph == "rotate"} == {
        "stored (onnx)",
        "eager",
        "ONNX Runtime, function body",
        "ONNX Runtime, op library",
        "onnx.reference",
    }
    assert bench_bundle(bundle, [(1, 1)], seconds=0.01).skipped == TORCH


def test_deploy_runs_no_code(monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr("torch._C.PyTorchFileReader", refuse)
        kit = deploy("cpp-libtorch", get_bundle("plain"), tmp_path / "kit")
    assert json.loads((kit / "kit.json").read_text())["expected_by"] == "onnxruntime"
    kit = deploy("cpp-libtorch", get_bundle("plain"), tmp_path / "other", allow_code=True)
    assert json.loads((kit / "kit.json").read_text())["expected_by"] == "torchscript"


def test_a_bundle_of_code_alone_is_not_proven_by_nothing(tmp_path):
    from helpers.bundles import make_rope

    bundle = export(make_rope("plain"), tmp_path / "b", formats=("torchscript",)).path
    message = f"{bundle} has tables as torchscript alone, whose code may run here: allow_code=True"
    check_refused(message, lambda: verify(bundle), tmp_path)
    check_refused(message, lambda: deploy("cpp-libtorch", bundle, tmp_path / "kit"), tmp_path)
    assert verify(bundle, allow_code=True).passed


def call(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_flag_of_the_commands(tmp_path):
    bundle = get_bundle("plain").path
    result = call("verify", bundle)
    assert result.exit_code == 0, result.output
    assert f"not run: TorchScript: {NOT_OPENED}\n" in result.stdout
    result = call("verify", bundle, "--allow-code", "--json")
    assert json.loads(result.stdout)["skipped"] == {}
    bench = ("bench", bundle, "--shape", 1, 1, "--seconds", 0.01)
    assert f"not run: torch.export: {NOT_OPENED}\n" in call(*bench).stdout
    assert "not run" not in call(*bench, "--allow-code").stdout
    run = ("run", bundle, "--graph", "tables", "--input", "seq_len=3", "--out", tmp_path / "o.npz")
    result = call(*run, "--runtime", "program")
    assert result.exit_code == 2
    assert "(--allow-code) opens it if you trust its author" in result.stderr
    assert call(*run, "--runtime", "program", "--allow-code").exit_code == 0
    serve = call("serve", bundle, "--runtime", "torchscript", "--allow-torchscript")
    assert "No such option" in serve.stderr


@pytest.mark.parametrize("name", ["manifest.json", "rotate.onnx", "folder/file"])
def test_a_symlink_is_refused(name, tmp_path):
    bundle = copy_bundle("plain", tmp_path)
    link, outside = bundle / name, tmp_path / "outside"
    link.parent.mkdir(exist_ok=True)
    outside.touch()
    if link.exists():
        link.rename(outside)
    link.symlink_to(outside)
    message = f"{bundle} contains '{name}', a symlink to '{outside}': a bundle has files alone"
    for act in (load, verify, read_manifest):
        check_refused(message, lambda act=act: act(bundle), tmp_path)
    assert call("inspect", bundle).exit_code == 2
    (tmp_path / "link").symlink_to(get_bundle("plain").path)
    assert load(tmp_path / "link").graph_name == "rotate"  # the folder itself may be named by one
