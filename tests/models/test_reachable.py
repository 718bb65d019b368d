"""Where the functions of a model are looked for."""

import sys
import types

from torch import nn

from rotary_export.models.find import reachable


def test_modules_that_import_what_they_are_asked_for_are_left_alone(monkeypatch):
    """As aliases in transformers 5.18 do, and fail without torchvision."""

    def refuse(name):
        raise ModuleNotFoundError(f"no module for {name}")

    lazy = types.ModuleType("lazy")
    lazy.__getattr__ = refuse
    for name in ("lazy_package.near", "lazy_package.far"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    far = sys.modules["lazy_package.far"]
    far.alias = lazy
    far.rotate = types.FunctionType((lambda x: x).__code__, {"__name__": far.__name__})
    model = type("Model", (nn.Module,), {"__module__": "lazy_package.near"})()
    names = {key for key, _ in reachable.list_module_values(model, {type(model)})}
    assert "rotate" in names
    assert "alias" not in names
