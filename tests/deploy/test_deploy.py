"""`deploy`: the folder it writes, and what it refuses."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.bundles import check_refused, copy_bundle, get_bundle, read_tree, run_eager
from helpers.target_runs import get_model_bundle

from rotary_export.bundle.manifest import check_files, read_manifest
from rotary_export.cli.main import cli
from rotary_export.deploy.deploy import KITS, SHARED, deploy
from rotary_export.deploy.targets import TARGETS, Target


@pytest.fixture
def target(monkeypatch, tmp_path):
    kits = tmp_path / "kits"
    (kits / "some").mkdir(parents=True)
    (kits / "some" / "README.md").write_text("read me")
    (kits / "shared" / "language").mkdir(parents=True)
    (kits / "shared" / "language" / "lib.txt").write_text("shared")
    monkeypatch.setattr("rotary_export.deploy.deploy.KITS", kits)
    monkeypatch.setitem(
        TARGETS, "some", Target("some machine", "our kernel", "onnx", shared=("language",))
    )


def list_folders(path):
    return {folder.name for folder in path.iterdir() if folder.is_dir()}


def list_files(folder):
    """Return the files of a folder, without those that pip compiles."""
    files = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    return {name for name in files if "__pycache__" not in name}


def test_every_target_has_a_kit_with_a_page():
    assert list_folders(KITS) == TARGETS.keys() | {SHARED}
    for name in TARGETS:
        assert (KITS / name / "README.md").is_file()


def test_every_shared_folder_is_used_and_hides_no_file_of_a_kit():
    used = {folder for target in TARGETS.values() for folder in target.shared}
    assert list_folders(KITS / SHARED) == used
    for name, target in TARGETS.items():
        folders = [KITS / name, *(KITS / SHARED / folder for folder in target.shared)]
        found = [list_files(folder) for folder in folders]
        assert len(set().union(*found)) == sum(map(len, found))


# Of any bundle: AOTInductor's is compiled first, and others need a decoder.
ANY_BUNDLE = [n for n, t in TARGETS.items() if t.format != "aoti" and t.check is None]


@pytest.mark.parametrize("name", ANY_BUNDLE)
def test_every_target_deploys_its_own_and_its_shared_files(name, tmp_path):
    out = deploy(name, get_bundle("plain"), tmp_path / "out")
    files = list_files(out)
    assert {"README.md", "kit.json", "bundle/manifest.json"} <= files
    assert list_files(KITS / name) <= files | {"model.py"}  # Triton's moves
    for folder in TARGETS[name].shared:
        assert list_files(KITS / SHARED / folder) <= files
    assert list_own_imports(out) <= files


def iterate_bundles():
    yield "plain", get_bundle("plain")
    yield "static", get_bundle("static")
    yield "opset18", get_bundle("opset18")  # ONNX alone
    yield "model", get_model_bundle()


@pytest.mark.parametrize("name", ANY_BUNDLE)
def test_a_kit_contains_the_formats_that_it_opens_and_a_page_of_its_bundle(name, tmp_path):
    for kind, bundle in iterate_bundles():
        target, graphs = TARGETS[name], bundle.manifest.graphs.values()
        if target.format not in next(iter(graphs)).files:
            continue
        if name == "tract" and kind == "model":
            continue  # of opset 23, which tract can't open
        out = deploy(name, bundle, tmp_path / f"{name}-{kind}")
        manifest = read_manifest(out / "bundle")
        check_files(out / "bundle", manifest)
        formats = {target.format, target.also} & set(next(iter(graphs)).files)
        wanted = {info.files[each] for info in graphs for each in formats}
        wanted |= {file for file in bundle.manifest.files if file.endswith(".json")}  # the model's
        assert list_files(out / "bundle") == wanted | {"manifest.json"}
        page = (out / "README.md").read_text(encoding="utf-8")
        assert not re.search(r"GRAPH|MODEL|<!-- (only|end only)", page)
        blocks = "\n".join(re.findall(r"^```(?:ba)?sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
        for file in re.findall(r"\bbundle/[\w.]+|[\w./]+\.(?:txt|py|yaml|mjs)\b", blocks):
            assert (out / file).exists(), file
        for model in re.findall(r"--load-model=(\w+)", blocks):
            assert (out / "model_repository" / model / "config.pbtxt").is_file()


@pytest.mark.parametrize("kind", ["plain", "static", "opset18", "model"])
def test_the_repository_of_triton_holds_weights_once_and_its_page_names_its_models(kind, tmp_path):
    bundle = dict(iterate_bundles())[kind]
    out = deploy("triton", bundle, tmp_path / "kit")
    for file in (out / "model_repository").rglob("*"):
        if file.suffix in (".onnx", ".pt"):
            assert file.samefile(out / "bundle" / file.name)
    models = list_folders(out / "model_repository")
    page = (out / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == models
    assert set(re.findall(r"^- `(\w+)`:", page, re.MULTILINE)) == models
    graph = "model" if kind == "model" else "rotate"
    wanted = {"static": ("python",), "opset18": ("onnxruntime", "python")}
    backends = wanted.get(kind, ("onnxruntime", "python", "pytorch"))
    assert models == {f"{graph}_{backend}" for backend in backends}


def test_a_kit_survives_the_change_of_its_bundle(tmp_path):
    """Nothing in it is a link to the bundle that was deployed."""
    bundle = copy_bundle("plain", tmp_path)
    out = deploy("triton", bundle, tmp_path / "kit")
    assert not any(
        file.samefile(bundle / file.name)
        for file in (out / "bundle").iterdir()
        if file.name != "manifest.json"
    )


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    out = deploy("triton", get_bundle("plain"), tmp_path / "kit")
    copies = [f for f in out.rglob("rotate.onnx")]
    assert len(copies) == 3
    assert len({file.read_bytes() for file in copies}) == 1


OWN_IMPORT = re.compile(r'(?:from |import\()"\./([\w.]+)"|#include "([\w.]+)"')


def list_own_imports(out):
    """Return the files beside them that the sources of a kit import."""
    names = set()
    for file in out.iterdir():
        if file.suffix in (".mjs", ".cc", ".h"):
            found = OWN_IMPORT.findall(file.read_text(encoding="utf-8"))
            names |= {first or second for first, second in found}
        elif file.suffix == ".py" and "from arrays import" in file.read_text(encoding="utf-8"):
            names.add("arrays.py")
    return names


@pytest.mark.usefixtures("target")
def test_writes_the_kit_the_bundle_and_an_example(tmp_path):
    out = deploy("some", get_bundle("plain"), tmp_path / "out")
    assert (out / "README.md").read_text() == "read me"
    assert (out / "lib.txt").read_text() == "shared"
    check_files(out / "bundle", read_manifest(out / "bundle"))
    kit = json.loads((out / "kit.json").read_text())
    assert kit["graph"] == "rotate"
    inputs = {name: np.load(out / "example" / f"{name}.npy") for name in kit["inputs"]}
    assert inputs["query"].shape[2] > 1
    for name, want in run_eager("plain", inputs).items():
        np.testing.assert_array_equal(np.load(out / "example/expected" / f"{name}.npy"), want)


@pytest.mark.usefixtures("target")
def test_deploys_a_whole_model_and_prints_json(tmp_path):
    bundle, out = get_model_bundle().path, tmp_path / "out"
    result = CliRunner().invoke(cli, ["deploy", "some", str(bundle), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["graph"] == "model"
    assert "example/expected/logits.npy" in printed["files"]


@pytest.mark.usefixtures("target")
def test_replaces_only_what_deploy_wrote(tmp_path):
    out = deploy("some", get_bundle("plain"), tmp_path / "out")
    check_refused("--force", lambda: deploy("some", get_bundle("plain"), out), tmp_path)
    (out / "old").touch()
    deploy("some", get_bundle("plain"), out, force=True)
    assert not (out / "old").exists()
    (out / "kit.json").unlink()
    act = lambda: deploy("some", get_bundle("plain"), out, force=True)  # noqa: E731
    check_refused("deploy did not write it", act, tmp_path)


@pytest.mark.usefixtures("target")
def test_refusals(tmp_path, monkeypatch):
    out = tmp_path / "out"
    check_refused("target must be one of", lambda: deploy("x", get_bundle("plain"), out), tmp_path)
    broken = copy_bundle("plain", tmp_path)
    (broken / "rotate.pt").write_bytes(b"")
    check_refused("sha256 differs", lambda: deploy("some", broken, out), tmp_path)
    monkeypatch.setitem(TARGETS, "other", Target("", "", "torchscript"))
    act = lambda: deploy("other", get_bundle("opset18"), out)  # noqa: E731
    check_refused("other needs the format 'torchscript'", act, tmp_path)


@pytest.mark.usefixtures("target")
def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(TARGETS, "some", Target("", "", "onnx", fail))
    before = read_tree(tmp_path)
    with pytest.raises(ValueError, match="No space left"):
        deploy("some", get_bundle("plain"), tmp_path / "out")
    assert read_tree(tmp_path) == before
