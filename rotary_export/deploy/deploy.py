"""`deploy`: a target's kit and a bundle in one folder, complete in itself."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rotary_export.bundle.atomic import check_folder, write_folder
from rotary_export.bundle.copy_files import copy_file, copy_tree
from rotary_export.bundle.folder import find_out
from rotary_export.bundle.manifest import (
    DATA_SUFFIX,
    Manifest,
    check_files,
    check_openable,
    check_passed,
    find_main_graph,
    read_manifest,
)
from rotary_export.bundle.manifest import FILE_NAME as MANIFEST
from rotary_export.deploy.example import SHAPE, make_example, run_by_position
from rotary_export.deploy.page import fit_page
from rotary_export.deploy.targets import TARGETS
from rotary_export.errors import RotaryExportError, explain_damage
from rotary_export.package import __version__
from rotary_export.proof.sample_inputs import fit_shapes
from rotary_export.runtime.load import RUNTIMES, open_session
from rotary_export.runtime.tensors import to_numpy
from rotary_export.types import Progress, ignore_progress

# Build outputs that a kit may have in a checkout.
NOT_COPIED = ("build", "node_modules", "__pycache__")
KITS = Path(__file__).parent / "kits"
SHARED = "shared"  # the folder in KITS of sources that several kits use
FILE_NAME = "kit.json"  # marks a folder as one that deploy wrote


def deploy(
    target: str,
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    allow_code: bool = False,
    progress: Progress = ignore_progress,
) -> Path:
    """Write the folder that runs a bundle on a target.

    It contains the target's kit (sources, README.md), the bundle in `bundle/` with the formats that
    the target opens, one example in `example/`, and `kit.json`. The example is `NAME.npy` of each
    input and, in `expected/`, of each output as ONNX Runtime computes it or, with `allow_code`, the
    bundle's TorchScript or program. `kit.json` lists their names.

    Args:
        target: A key of `rotary_export.deploy.targets.TARGETS`.
        bundle: The bundle's folder.
        out: The folder to write. It must not exist; with `force`, deploy must have written it.
        force: Replace a folder that deploy wrote.
        allow_code: Open the bundle's TorchScript or program, whose code may run here.
        progress: Called with the current step.

    Returns:
        The folder.

    Raises:
        RotaryExportError: The target is unknown, the bundle is damaged or lacks the format that
            the target opens or what else it needs, none of its formats may be opened here, or `out`
            already exists. Nothing is left behind.
    """
    if target not in TARGETS:
        raise RotaryExportError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    source, path = Path(bundle), find_out(out)
    check_folder(path, force, _check_owned)
    progress("check the bundle")
    manifest = read_manifest(source)
    check_passed(source, manifest)
    check_files(source, manifest)
    check_openable(source, manifest, allow_code)
    graph = find_main_graph(source, manifest)
    known = TARGETS[target]
    if known.format not in manifest.graphs[graph].files:
        raise RotaryExportError(
            f"{target} needs the format {known.format!r}, but the bundle was exported with "
            f"{', '.join(manifest.graphs[graph].files)}"
        )
    if manifest.config.get("decoder", {}).get("cache") == "window" and not known.has_windows:
        raise RotaryExportError(
            f"{target} needs a cache whose layers have one length, but the bundle was exported "
            "with cache 'window': export the model with --cache full"
        )
    if known.check is not None:
        known.check(source, manifest, graph)
    with write_folder(path, force, _check_owned) as staging:
        progress(f"copy the kit {target}")
        for folder in (*(f"{SHARED}/{each}" for each in known.shared), target):
            copy_tree(KITS / folder, staging, NOT_COPIED)
        fit_page(staging / "README.md", graph, "decoder" in manifest.config)
        opened = _select_formats(manifest, (known.format, known.also))
        (staging / "bundle").mkdir()
        (staging / "bundle" / MANIFEST).write_text(opened.to_json(), encoding="utf-8")
        for name in opened.files:
            copy_file(source / name, staging / "bundle" / name)
        progress("run the example")
        with explain_damage(f"{source} can't be deployed"):
            facts = _write_example(source, staging, manifest, graph, allow_code)
            if known.prepare is not None:
                progress(f"write the files of {target} for this bundle")
                known.prepare(staging, opened, graph)
        kit = {"target": target, "rotary_export": __version__, **facts}
        (staging / FILE_NAME).write_text(json.dumps(kit, indent=1) + "\n", encoding="utf-8")
    return path


def _check_owned(path: Path) -> None:
    """Refuse to replace a folder that deploy did not write."""
    if not (path / FILE_NAME).is_file():
        raise RotaryExportError(f"{path} exists and deploy did not write it; it was not changed")


def _select_formats(manifest: Manifest, formats: Sequence[str | None]) -> Manifest:
    """Return the manifest of a bundle without the other formats' files."""
    graphs, left_out = {}, set()
    for name, info in manifest.graphs.items():
        files = {kind: file for kind, file in info.files.items() if kind in formats}
        graphs[name] = replace(info, files=files)
        left_out |= {file for kind, file in info.files.items() if kind not in formats}
    left_out |= {f"{file}{DATA_SUFFIX}" for file in left_out}
    return replace(
        manifest,
        graphs=graphs,
        files={name: digest for name, digest in manifest.files.items() if name not in left_out},
        compiled_for=manifest.compiled_for if "aoti" in formats else {},
    )


def _write_example(
    source: Path, staging: Path, manifest: Manifest, graph: str, allow_code: bool
) -> dict[str, object]:
    """Write inputs and outputs of one call, and return their names and origin."""
    info = manifest.graphs[graph]
    batch_size, seq_len = next(iter(fit_shapes(manifest, graph, [SHAPE])))
    runtimes = ("torchscript", "program") if allow_code else ()
    runtime = next(r for r in (*runtimes, "onnxruntime") if RUNTIMES[r] in info.files)
    session = open_session(source, manifest, graph, runtime)
    inputs = make_example(manifest, graph, batch_size, seq_len, run_by_position(session))
    outputs = session(**inputs)
    expected = staging / "example" / "expected"
    expected.mkdir(parents=True)
    for folder, arrays in ((expected.parent, inputs), (expected, outputs)):
        for name, value in arrays.items():
            np.save(folder / f"{name}.npy", to_numpy(value))
    return {
        "graph": graph,
        "inputs": [i.name for i in info.inputs],
        "outputs": [o.name for o in info.outputs],
        "expected_by": runtime,
    }
