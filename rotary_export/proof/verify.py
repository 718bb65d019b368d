"""`verify`: prove a bundle again, wherever it was copied."""

from __future__ import annotations

import os
from pathlib import Path

from rotary_export.bundle.manifest import check_files, check_openable, read_manifest
from rotary_export.errors import RotaryExportError, explain_damage
from rotary_export.proof.models.compare import compare_model, remake_cases
from rotary_export.proof.plain import compare_plain
from rotary_export.proof.report import Report
from rotary_export.proof.tolerances import FUSED
from rotary_export.types import Progress, ignore_progress


def verify(
    bundle_dir: str | os.PathLike[str],
    progress: Progress = ignore_progress,
    *,
    allow_code: bool = False,
) -> Report:
    """Compare every graph of a bundle, in every format and runtime present, with eager PyTorch.

    A model is not in its bundle: what its export compared with the model itself is compared here
    with the first format that exists, of `.pt2`, `.pt` and ONNX without the op library.

    Args:
        bundle_dir: The bundle's folder.
        progress: Called with what is being run.
        allow_code: Open the formats whose code may run here, too: all but ONNX. Without it, the
            report lists them as not opened.

    Returns:
        The report; `report.passed` is whether it is within the tolerances.

    Raises:
        RotaryExportError: The bundle is damaged or can't be loaded, or none of its formats may
            be opened.
    """
    path = Path(bundle_dir)
    manifest = read_manifest(path)
    check_files(path, manifest)
    check_openable(path, manifest, allow_code)
    with explain_damage(f"{path} can't be verified"):
        if not manifest.is_model:
            return compare_plain(path, manifest, progress, allow_code=allow_code)
        report = Report()
        for name in manifest.graphs:
            graph = manifest.select(name)
            cases = remake_cases(path, graph, allow_code=allow_code)
            report.join(compare_model(path, graph, cases, progress, allow_code=allow_code))
        if not report.rows:
            raise RotaryExportError(f"{path} has nothing that can be compared here")
        if FUSED in manifest.config or not allow_code:
            report.reference = report.rows[0].runtime
        return report
