"""The settings of MLServer for a bundle: model-settings.json; and a copy of this package."""

from __future__ import annotations

import json
from pathlib import Path

from rotary_export.bundle.manifest import Manifest
from rotary_export.deploy.package_copy import copy_package
from rotary_export.serving.core import MAX_BATCH_SIZE


def prepare_mlserver(staging: Path, manifest: Manifest, graph: str) -> None:
    """Write the settings of the one model, and the package that they name."""
    copy_package(staging / "rotary_export")
    settings = {
        "name": manifest.name,
        "implementation": "rotary_export.serving.mlserver.model.RotaryModel",
        "parameters": {
            "uri": "./bundle",
            "version": "1",
            "extra": {"graph": graph, "max_batch_size": MAX_BATCH_SIZE},
        },
    }
    text = json.dumps(settings, indent=1) + "\n"
    (staging / "model-settings.json").write_text(text, encoding="utf-8")
