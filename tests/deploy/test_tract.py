"""tract: bundles that deploy refuses; `test_inlined.py` runs the others."""

from helpers.bundles import check_refused, get_bundle
from helpers.target_runs import get_model_bundle

from rotary_export.deploy.deploy import deploy


def test_refusals(tmp_path):
    act = lambda: deploy("tract", get_bundle("bfloat16"), tmp_path / "kit")  # noqa: E731
    check_refused("it has no bfloat16), got bfloat16", act, tmp_path)
    act = lambda: deploy("tract", get_model_bundle(), tmp_path / "kit")  # noqa: E731
    check_refused("(rotary-export export-model --opset 18), got opset 23, whose", act, tmp_path)
