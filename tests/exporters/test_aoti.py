"""The format `aoti`: what is refused before anything is compiled or loaded.

What it compiles is run in tests/deploy/test_cpp_aoti.py.
"""

from __future__ import annotations

import json

import pytest
from helpers.bundles import check_refused, copy_bundle, edit_manifest, make_rope, update_hash
from torch._inductor import config as inductor_config

import rotary_export
from rotary_export import load
from rotary_export.bundle.manifest import DEFAULT_FORMATS, read_manifest
from rotary_export.runtime.compiled import COMPILED_FOR


def test_is_no_default():
    assert "aoti" not in DEFAULT_FORMATS


def test_needs_the_program(tmp_path):
    act = lambda: rotary_export.export(  # noqa: E731
        make_rope("plain"), tmp_path / "b", formats=("onnx", "aoti")
    )
    check_refused("'aoti' is compiled from 'program', which formats must name too", act, tmp_path)


def test_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    act = lambda: rotary_export.export(  # noqa: E731
        make_rope("plain"), tmp_path / "b", formats=("program", "aoti")
    )
    check_refused("the format 'aoti' needs a C++ compiler, g++ is not installed", act, tmp_path)


def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    act = lambda: rotary_export.export(  # noqa: E731
        make_rope("plain"), tmp_path / "out" / "b", formats=("program", "aoti")
    )
    # Not by monkeypatch, whose end leaves no such setting for the tests that follow.
    with inductor_config.patch({"cpp.cxx": (None, "false")}):
        check_refused("AOTInductor can't compile tables.pt2: ", act, tmp_path / "out")


def add_compiled(bundle, **compiled_for):
    """Put a file that is no compiled graph into a bundle."""
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    graphs["rotate"]["files"]["aoti"] = "rotate.aoti.pt2"
    (bundle / "rotate.aoti.pt2").write_bytes(b"garbage")
    edit_manifest(bundle, graphs=graphs, compiled_for=compiled_for)
    update_hash(bundle, "rotate.aoti.pt2")


REFUSALS = {
    "nothing said": ({}, "manifest.json does not name the machine that its compiled graphs need"),
    "half said": ({"machine": "x86_64"}, "does not name the machine that its compiled graphs need"),
    "machine": (
        COMPILED_FOR | {"machine": "aarch64"},
        "rotate.aoti.pt2 can't run here: it needs Linux aarch64 with AVX2, this is",
    ),
    "system": (
        COMPILED_FOR | {"system": "Darwin"},
        "rotate.aoti.pt2 can't run here: it needs Darwin x86_64 with AVX2, this is",
    ),
    "instruction set": (
        COMPILED_FOR | {"instruction_set": "AMX"},
        "rotate.aoti.pt2 can't run here: it needs Linux x86_64 with AMX, this is",
    ),
    "garbage": (COMPILED_FOR, "can't load rotate.aoti.pt2: "),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_load_refuses(refusal, tmp_path):
    compiled_for, message = REFUSALS[refusal]
    bundle = copy_bundle("plain", tmp_path)
    add_compiled(bundle, **compiled_for)
    check_refused(message, lambda: load(bundle, runtime="aoti", allow_code=True), tmp_path)


def test_a_manifest_of_before(tmp_path):
    bundle = copy_bundle("plain", tmp_path)
    edit_manifest(bundle, compiled_for=None)
    assert read_manifest(bundle).compiled_for == {}
    check_refused(
        "runtime 'aoti' needs rotate.aoti.pt2",
        lambda: load(bundle, runtime="aoti", allow_code=True),
        bundle,
    )
