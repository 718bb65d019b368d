"""The installed package: its version and its folders. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"


# Of the extra `export`; a deployment does without.
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir", "ml_dtypes")


def describe_missing(what: str, package: str | None, extra: str) -> str:
    """Return what lacks a package, and the command that installs the extra which has it.

    This package is on no index: it is installed from its checkout or wheel.
    """
    return (
        f"{what} needs {package}: pip install '.[{extra}]' in the checkout of rotary_export, "
        f"or 'FILE.whl[{extra}]' with its wheel"
    )


def package_folders() -> list[Path]:
    """Return the folders of the package.

    An editable install has two: one of sources, one of built files.
    """
    spec = find_spec("rotary_export")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return [Path(folder).resolve() for folder in spec.submodule_search_locations]


def hide_folders(text: str) -> str:
    """Return a message without the folders of this machine; a path becomes its last part."""
    for folder in package_folders():  # their names may have spaces
        text = text.replace(str(folder), folder.name)
    return re.sub(r"(?<![\w./:])/(?!/)(?:[^\s/,;:'\"()]+/)*", "", text)


def find_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed, by name."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
