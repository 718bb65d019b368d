"""Run the blocks of a page: Python as it stands, commands of `rotary-export`, else checked."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from helpers.pages import Block, Page
from helpers.paths import CSRC, ROOT

from rotary_export.cli.main import cli

# Programs of the system or of a target: that they are called is all that is checked.
SYSTEM_PROGRAMS = frozenset("cmake curl docker git node npm".split())
STAYS_OPEN = frozenset(["serve"])  # commands of rotary-export that are parsed alone
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]*\b")  # BUNDLE, IN.onnx, --replicas N
INSTRUCTION_SET = "avx512"  # the pages' example; a test's machine may have another


def run_page(page: Page) -> None:
    """Run every block of a page in the current folder, in order, in one namespace.

    Raises:
        AssertionError: A command is wrong, or a `print` shows something else than its comment.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in page.blocks:
        if block.language == "python":
            run_python(block, page.name, namespace)
        elif block.language == "bash":
            for words in split_commands(block.code):
                run_command(words)


def run_python(block: Block, name: str, namespace: dict[str, Any]) -> None:
    """Run one block, statement by statement; `print(x)  # value` must print the value."""
    lines = block.code.splitlines()
    for node in ast.parse("\n" * (block.line - 1) + block.code, name).body:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module([node], []), name, "exec"), namespace)
        is_print = isinstance(node, ast.Expr) and ast.unparse(node).startswith("print(")
        _, hash_sign, expected = lines[node.end_lineno - block.line].rpartition("  # ")
        if is_print and hash_sign:
            where = f"{name}:{node.end_lineno}"
            assert matches(printed.getvalue(), expected), f"{where}: printed {printed.getvalue()}"


def matches(printed: str, expected: str) -> bool:
    """Whether a line was printed; "..." stands for anything."""
    pattern = re.escape(" ".join(expected.split())).replace(r"\.\.\.", ".*")
    pattern = pattern.replace(INSTRUCTION_SET, r"\w+")
    return re.fullmatch(pattern, " ".join(printed.split())) is not None


def split_commands(code: str) -> Iterator[list[str]]:
    """Yield the commands of a block as words."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                yield from [words] if words else []
                words = []
            else:
                words.append(word)


def run_command(words: list[str]) -> None:
    """Run a command of `rotary-export`, or check one of another program."""
    while match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0]):
        words = words[1:]
        if match[1] == "_ROTARY_EXPORT_COMPLETE":
            assert match[2] in ("bash_source", "zsh_source", "fish_source")
    if words[0] == "eval":
        for inner in split_commands(words[1].removeprefix("$(").removesuffix(")")):
            run_command(inner)
        return
    program = words[0].removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        words = words[2:] if words[1] == "-m" else words[1:]
        program = words[0]
    if program in ("rotary-export", "rotary_export"):
        run_rotary_export(words[1:])
    elif program.startswith("tools/"):
        check_tool(ROOT / program, words[1:])
    elif program in CHECKS:
        CHECKS[program](words[1:])
    else:
        assert program in SYSTEM_PROGRAMS, f"unknown program: {program}"


def run_rotary_export(arguments: list[str]) -> None:
    """Run a command, or parse it where an argument is a placeholder or where it would not end."""
    arguments = arguments[: arguments.index(">")] if ">" in arguments else arguments
    if not arguments:
        return
    name, rest = arguments[0], arguments[1:]
    if name in STAYS_OPEN or any(PLACEHOLDER.search(word) for word in rest):
        command = cli.commands.get(name)
        assert command is not None, f"rotary-export has no command {name}"
        command.make_context(name, ["1" if word == "N" else word for word in rest])
    else:
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, f"{shlex.join(arguments)}: {result.output}"


def check_tool(file: Path, arguments: list[str]) -> None:
    """Check that a program of the checkout exists and has the options."""
    assert file.is_file(), f"{file} does not exist"
    text = file.read_text(encoding="utf-8")
    options = set(arguments)
    if file.suffix == ".py":
        # Its own, and those of the modules beside it that it imports.
        imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        beside = [file.parent / f"{node.module}.py" for node in imports]
        text += "".join(path.read_text(encoding="utf-8") for path in beside if path.is_file())
        text = text.replace("from __future__ import annotations\n", "")
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        added = [c for c in calls if ast.unparse(c.func).endswith("add_argument")]
        options = {a.value for c in added for a in c.args if isinstance(a, ast.Constant)}
    else:
        assert os.access(file, os.X_OK), f"{file} is not executable"
    for argument in arguments:
        known = argument in options and argument in text
        assert known or not argument.startswith("--"), f"{file} has no option {argument}"


def check_pip(arguments: list[str]) -> None:
    """Check that the extras, the constraints and the build's options exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    build = (CSRC / "CMakeLists.txt").read_text(encoding="utf-8")
    for flag, value in pairwise(["", *arguments]):
        if extras := re.fullmatch(r"(?:\.|rotary_export)\[(.+)\]", value):
            assert set(extras[1].split(",")) <= project["optional-dependencies"].keys(), value
        if option := re.fullmatch(r"cmake\.define\.(\w+)=\w+", value):
            assert option[1] in build, value
        if flag == "-c":
            assert (ROOT / value).is_file(), value


def check_pytest(arguments: list[str]) -> None:
    """Check that the tests exist."""
    paths = [ROOT / word.partition("::")[0] for word in arguments if word.startswith("tests")]
    for path in paths:
        assert path.exists(), f"{path} does not exist"
    files = [f for p in paths for f in ([p] if p.is_file() else p.rglob("test_*.py"))]
    texts = [file.read_text(encoding="utf-8") for file in files]
    for flag, value in pairwise(arguments):
        assert flag != "-k" or any(value in text for text in texts), f"no test is called {value}"


CHECKS = {"pip": check_pip, "pytest": check_pytest, "venv": lambda arguments: None}
