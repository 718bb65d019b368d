"""Pipes, terminals and signals: what is printed, and what remains."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import EXPORT, call

from rotary_export.cli import terminal as terminal_module
from rotary_export.cli.terminal import Terminal, print_error, print_line
from rotary_export.errors import RotaryExportError


def test_a_closed_pipe_is_not_an_error(bundle):
    command = f"{sys.executable} -P -m rotary_export inspect {bundle} | head -n 1"
    command += "; echo ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "bundle: bundle\n0\n"
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["verify"]])
def test_the_exit_code_is_that_of_the_command_when_nobody_reads(bundle, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "rotary_export", *arguments, str(bundle)]
    done = subprocess.run(command, stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 0


def test_progress_that_nobody_reads_does_not_stop_an_export(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "rotary_export", *EXPORT, "--out", str(tmp_path / "b")]
    done = subprocess.run(
        [*command, "--format", "torchscript"], stdout=writer, stderr=writer, check=False
    )
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "b" / "manifest.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "rotary_export", *EXPORT, "--out", tmp_path / "b"],
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("export rotate.onnx"):
            assert list(tmp_path.iterdir())
            process.send_signal(number)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 128 + number
    assert "Traceback" not in rest
    assert ("rotary-export: interrupted" in rest) == (number == signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def run_on_terminal(*arguments, columns):
    """Return what a command prints on a terminal, and its exit code."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "rotary_export", *map(str, arguments)],
        stdout=child,
        stderr=child,
        env=os.environ | {"TERM": "xterm", "COLUMNS": str(columns)},
    )
    os.close(child)
    chunks = []
    try:
        while chunk := os.read(parent, 65536):
            chunks.append(chunk)
    except OSError:  # the other end is closed
        pass
    os.close(parent)
    return b"".join(chunks).decode(), process.wait()


def test_terminal_gets_a_table_and_a_spinner(bundle):
    text, code = run_on_terminal("verify", bundle, columns=160)
    assert code == 0
    assert re.search(r"\x1b\[1moutput +runtime ", text)
    assert "verify" not in text.splitlines()[-1]
    assert "proven: " in text


@pytest.mark.parametrize("on_terminal", [True, False], ids=["terminal", "pipe"])
def test_tables_fit_80_columns(bundle, on_terminal):
    for arguments in (["verify", bundle], ["inspect", bundle], ["inspect", bundle / "rotate.onnx"]):
        if on_terminal:
            text, code = run_on_terminal(*arguments, columns=80)
        else:
            result = call(*arguments)
            text, code = result.stdout, result.exit_code
        assert code == 0
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
        long = [line for line in lines if len(line) > 80 and "was compared at" not in line]
        assert long == []
        assert "…" not in text.replace("⠋", "")
    assert "\n  attributes: rotary_embedding_dim=8" in text.replace("\r", "")


@pytest.mark.parametrize("columns", [20, 200])
def test_a_row_that_is_too_wide_for_the_terminal_becomes_a_block(bundle, columns):
    inputs = ("--graph", "tables", "--input", "seq_len=3")
    out = bundle.parent / f"o{columns}.npz"
    text, _ = run_on_terminal("run", bundle, *inputs, "--out", out, columns=columns)
    assert ("output: freqs\r\n  dtype: float32\r\n" in text) == (columns == 20)
    assert ("freqs   float32  (16, 8)" in text) == (columns == 200)


EVIL = "a\x1b[31m\nproven: b"
SHOWN = "a\\x1b[31m\\nproven: b"


def test_all_that_is_printed_is_escaped(capfd):
    terminal = Terminal(as_json=False)
    terminal.line(EVIL)
    terminal.field("name", EVIL)
    terminal.table((EVIL,), [(EVIL,)])
    with terminal.progress() as progress:
        progress(EVIL)
    print_line(EVIL)
    print_error(EVIL)
    printed = capfd.readouterr()
    assert printed.out == "".join(f"{line}\n" for line in (SHOWN, f"name: {SHOWN}", *[SHOWN] * 3))
    assert printed.err == f"{SHOWN}\nrotary-export: {SHOWN}\n"
    assert str(RotaryExportError(EVIL)) == SHOWN.replace("\\n", " ")


def test_commands_print_through_the_terminal_alone():
    folder = Path(terminal_module.__file__).parent
    for file in folder.glob("*.py"):
        printing = re.findall(r"click\.echo|\bprint\((?!json\.dumps)", file.read_text())
        assert file.name == "terminal.py" or not printing, file.name
