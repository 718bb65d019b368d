"""The files of a bundle are compared with the hashes in its manifest."""

import pytest
from helpers.bundles import copy_bundle

from rotary_export.bundle.manifest import check_files, read_manifest
from rotary_export.errors import CheckFailedError


@pytest.fixture
def bundle(tmp_path):
    return copy_bundle("plain", tmp_path)


def test_the_files_of_an_export_are_accepted(bundle):
    check_files(bundle, read_manifest(bundle))


def test_another_byte_is_refused_where_the_file_is_asked_for(bundle):
    file = bundle / "rotate.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, ["tables.onnx"])
    for names in (None, ["rotate.onnx"]):
        with pytest.raises(CheckFailedError, match=r"rotate\.onnx .* its sha256 differs"):
            check_files(bundle, manifest, names)


def test_a_missing_file_is_refused(bundle):
    (bundle / "tables.pt").unlink()
    with pytest.raises(CheckFailedError, match=r"tables\.pt is missing from the bundle"):
        check_files(bundle, read_manifest(bundle))
