"""Type checkers know the names of the package in a user's file."""

import os
import subprocess
import sys
from pathlib import Path

import rotary_export

USER = """
import rotary_export

session = rotary_export.load("bundle", graph="rotate")
reveal_type(session.kernel_path)
reveal_type(rotary_export.verify("bundle").passed)
rotary_export.load("bundle", grpah="rotate")
rope = rotary_export.RotaryEmbedding(64, use_xpos=True)
reveal_type(rope.dim)
rotary_export.export(rope, "out", opset="23")
"""


def test_mypy_finds_the_signatures(tmp_path):
    file = tmp_path / "user.py"
    file.write_text(USER)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")  # large
    package = Path(rotary_export.__file__).parents[1]
    path = {} if package.name == "site-packages" else {"MYPYPATH": str(package)}
    command = [sys.executable, "-m", "mypy", "--no-incremental", "--follow-imports=silent", file]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | path
    )
    for line, text in (
        (5, 'note: Revealed type is "str"'),
        (6, 'note: Revealed type is "bool"'),
        (7, 'error: Unexpected keyword argument "grpah" for "load"'),
        (9, 'note: Revealed type is "int"'),
        (10, 'error: Argument "opset" to "export" has incompatible type "str"'),
    ):
        assert f"user.py:{line}: {text}" in done.stdout


def test_lazy_names_are_those_that_type_checkers_see():
    text = Path(rotary_export.__file__).read_text(encoding="utf-8")
    for name, module in rotary_export._LAZY_EXPORTS.items():
        assert f"from {module} import {name} as {name}\n" in text
    assert len(rotary_export.__all__) <= 18
    assert (Path(rotary_export.__file__).parent / "py.typed").is_file()
