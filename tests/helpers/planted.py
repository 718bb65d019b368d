"""A fault that is planted in a model while it is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rotary_export.models.find import replace
from rotary_export.models.prove import build_graph as module


@contextmanager
def plant_fault() -> Iterator[None]:
    """Rotate the second layer by other tables, while the model is traced."""
    real_write, real_rotate = module.write_graph, replace.rotate_slots

    def write(*args, **kwargs):
        calls = 0

        def rotate_slots(xs, tables, lowering):
            nonlocal calls
            calls += 1
            if calls == 2:
                tables = [(cos * 1.01, sin) for cos, sin in tables]
            return real_rotate(xs, tables, lowering)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(replace, "rotate_slots", rotate_slots)
            return real_write(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "write_graph", write)
        yield
