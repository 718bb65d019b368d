"""Trained models, which `tools/real/fetch_models.py` fetches; tests fetch nothing."""

from __future__ import annotations

import os
from pathlib import Path

import fetch_models
import pytest


def require_model(name: str) -> Path:
    """Return the folder of a trained model; where it is not there, skip.

    In CI nothing is skipped.
    """
    folder = fetch_models.FOLDER / name
    if not folder.is_dir():
        why = f"{name} is not fetched: python tools/real/fetch_models.py {name}"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return folder
