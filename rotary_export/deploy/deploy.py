"""`deploy`: a target's kit and a bundle, in one folder that is copied and built as it stands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rotary_export.bundle.atomic import write_folder
from rotary_export.bundle.manifest import FILE_NAME as MANIFEST
from rotary_export.bundle.manifest import Manifest, check_files, find_main_graph, read_manifest
from rotary_export.deploy.example import SHAPE, make_example
from rotary_export.deploy.targets import TARGETS
from rotary_export.errors import RotaryExportError
from rotary_export.package import __version__
from rotary_export.proof.sample_inputs import fit_shapes
from rotary_export.runtime.load import RUNTIMES, open_session
from rotary_export.runtime.tensors import is_torch, make_bfloat16

# What a kit may have been built into, in a checkout.
LEFT_BEHIND = ("build", "node_modules", "__pycache__")
KITS = Path(__file__).parent / "kits"
FILE_NAME = "kit.json"  # marks a folder as one that deploy wrote


def deploy(
    target: str,
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the folder that runs a bundle on a target.

    It holds the target's kit (sources, README.md), the bundle in `bundle/`, one example in
    `example/` (`NAME.npy` of each input and, in `expected/`, of each output, as the bundle's
    TorchScript or program computes it), and `kit.json`, which says what is what.

    Args:
        target: Of `rotary_export.deploy.targets.TARGETS`.
        bundle: The bundle's folder.
        out: The folder to write; it must not exist, or be one that deploy wrote and `force` given.
        force: Replace what deploy wrote before.
        progress: Called with what is being done.

    Returns:
        The folder.

    Raises:
        RotaryExportError: The target is unknown, the bundle is damaged or lacks what the target
            opens, or `out` is in the way; nothing is left behind.
    """
    if target not in TARGETS:
        raise RotaryExportError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    source, path = Path(bundle), Path(out).absolute()
    say = progress or (lambda _: None)
    say("check the bundle")
    manifest = read_manifest(source)
    check_files(source, manifest)
    graph = find_main_graph(source, manifest)
    needs = TARGETS[target].format
    if needs not in manifest.graphs[graph].files:
        raise RotaryExportError(
            f"{target} needs the format {needs!r}, but the bundle was exported with "
            f"{', '.join(manifest.graphs[graph].files)}"
        )
    with write_folder(path, force, _check_owned) as staging:
        say(f"copy the kit {target}")
        left = shutil.ignore_patterns(*LEFT_BEHIND)
        shutil.copytree(KITS / target, staging, ignore=left, dirs_exist_ok=True)
        (staging / "bundle").mkdir()
        for name in (MANIFEST, *manifest.files):
            shutil.copy2(source / name, staging / "bundle" / name)
        say("run the example")
        facts = _write_example(staging, manifest, graph)
        prepare = TARGETS[target].prepare
        if prepare is not None:
            say(f"write what {target} needs")
            prepare(staging, manifest, graph)
        kit = {"target": target, "rotary_export": __version__, **facts}
        (staging / FILE_NAME).write_text(json.dumps(kit, indent=1) + "\n", encoding="utf-8")
    return path


def _check_owned(path: Path) -> None:
    """Refuse to replace a folder that deploy did not write."""
    if not (path / FILE_NAME).is_file():
        raise RotaryExportError(f"{path} exists and deploy did not write it; it is left as it is")


def _write_example(staging: Path, manifest: Manifest, graph: str) -> dict[str, object]:
    """Write inputs and outputs of one call, and return what they are."""
    info = manifest.graphs[graph]
    batch_size, seq_len = next(iter(fit_shapes(manifest, graph, [SHAPE])))
    inputs = make_example(manifest, graph, batch_size, seq_len)
    runtime = next(
        r for r in ("torchscript", "program", "onnxruntime") if RUNTIMES[r] in info.files
    )
    session = open_session(staging / "bundle", manifest, graph, runtime)
    outputs = session(**inputs)
    expected = staging / "example" / "expected"
    expected.mkdir(parents=True)
    for folder, arrays in ((expected.parent, inputs), (expected, outputs)):
        for name, value in arrays.items():
            np.save(folder / f"{name}.npy", _to_numpy(value))
    return {
        "graph": graph,
        "inputs": [i.name for i in info.inputs],
        "outputs": [o.name for o in info.outputs],
        "expected_by": runtime,
    }


def _to_numpy(value: Any) -> np.ndarray[Any, Any]:
    """Return an array, or a tensor as one; numpy writes bfloat16 as raw two-byte items."""
    if not is_torch(value):
        return np.asarray(value)
    import torch

    if value.dtype == torch.bfloat16:
        return np.asarray(value.view(torch.int16).numpy()).view(make_bfloat16())
    return np.asarray(value.numpy())
