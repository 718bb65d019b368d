"""A bundle for the tests of commands."""

import pytest
from helpers.commands import EXPORT, call


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "bundle"
    result = call(*EXPORT, "--out", out)
    assert result.exit_code == 0, result.output
    return out
