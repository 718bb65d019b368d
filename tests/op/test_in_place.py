"""Exported models with dynamic shapes: ONNX Runtime lets the op write over its inputs."""

from __future__ import annotations

import pytest
from measure_in_place import ASKED, STYLES, build_probe, count_in_place


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    return build_probe(tmp_path_factory.mktemp("probe"))


@pytest.mark.parametrize(
    ("style", "opset"), [*((style, 23) for style in STYLES), ("heads", 18), ("second-reader", 18)]
)
def test_what_nothing_else_reads_is_written_over(style, opset, probe, tmp_path):
    count = count_in_place(style, 2, opset, probe, tmp_path)
    assert (count.nodes, count.outputs) == (2, 4)
    # The probe also counts what ORT must not alias: a key that is read again.
    assert count.eligible == (2 if style == "second-reader" else 4)
    assert count.aliased <= count.eligible
    assert count.aliased >= ASKED * count.eligible
