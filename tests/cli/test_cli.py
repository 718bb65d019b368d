"""The commands: human-readable output, pipes, JSON, exit codes, one line per mistake."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from rotary_export.cli import terminal as terminal_module
from rotary_export.cli.examples import EXAMPLES
from rotary_export.cli.main import cli
from rotary_export.cli.terminal import Terminal, print_error, print_line
from rotary_export.errors import RotaryExportError

EXPORT = ["export", "--dim", "8", "--use-xpos", "--max-seq-len", "16", "--num-heads", "2"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "bundle"
    result = call(*EXPORT, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_export_prints_the_proof_in_plain_lines(tmp_path):
    result = call(*EXPORT, "--out", tmp_path / "b", "--format", "torchscript")
    assert result.exit_code == 0
    assert "proven: " in result.stdout
    assert "rotate" in result.stdout
    assert "export rotate.pt\n" in result.stderr
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "manifest.json",
        "rotate.pt",
        "tables.pt",
    ]


def test_export_passes_every_flag_on(tmp_path):
    result = call(
        *("export", "--dim", 8, "--max-seq-len", 16, "--out", tmp_path / "b"),
        *("--interpolation-factor", 2, "--base", 500, "--base-rescale-factor", 1.5),
        *("--use-xpos", "--scale-base", 256, "--num-heads", 4, "--num-kv-heads", 2),
        *("--head-dim", 16, "--interleaved", "--static", "--batch-size", 3),
        *("--format", "onnx", "--opset", 21, "--dtype", "float16"),
    )
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["opset"] == 21
    assert manifest["config"] == {
        "embedding": {
            "dim": 8,
            "use_xpos": True,
            "scale_base": 256.0,
            "interpolation_factor": 2.0,
            "base": 500.0,
            "base_rescale_factor": 1.5,
        },
        "max_seq_len": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "interleaved": True,
        "static": True,
        "batch_size": 3,
        "dtype": "float16",
    }


def test_force_is_needed_to_replace(bundle):
    before = (bundle / "manifest.json").read_bytes()
    result = call(*EXPORT, "--out", bundle)
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert (bundle / "manifest.json").read_bytes() == before


def test_verify(bundle):
    result = call("verify", bundle)
    assert result.exit_code == 0
    assert "within tolerance" in result.stdout


def test_verify_json(bundle):
    result = call("verify", bundle, "--json")
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert {row["graph"] for row in report["rows"]} == {"tables", "rotate"}


def test_verify_of_a_changed_file_exits_1(bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "rotate.pt").open("ab") as file:
        file.write(b"x")
    result = call("verify", copy)
    assert result.exit_code == 1
    assert "rotate.pt" in result.stderr
    assert "sha256" in result.stderr


def test_run_npy_and_npz(bundle, tmp_path):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((3, 2, 5, 8), dtype=np.float32)
    ids = np.tile(np.arange(5), (3, 1))
    np.save(tmp_path / "q.npy", query)
    np.savez(tmp_path / "rest.npz", key=query, position_ids=ids)
    out = tmp_path / "out.npz"
    arguments = ("run", bundle, "--input", f"query={tmp_path / 'q.npy'}")
    arguments += ("--input", tmp_path / "rest.npz", "--out", out)

    result = call(*arguments)
    assert result.exit_code == 0, result.output
    with np.load(out) as outputs:
        assert outputs["query_out"].shape == query.shape
        np.testing.assert_array_equal(outputs["query_out"].shape, outputs["key_out"].shape)
        assert not np.array_equal(outputs["query_out"], query)
    assert not list(tmp_path.glob(".*"))

    again = call(*arguments)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    forced = call(*arguments, "--force", "--json", "--no-op-library")
    assert json.loads(forced.stdout)["kernel_path"] == "native"


def test_run_scalar(bundle, tmp_path):
    out = tmp_path / "out.npz"
    result = call("run", bundle, "--graph", "tables", "--input", "seq_len=3", "--out", out)
    assert result.exit_code == 0, result.output
    with np.load(out) as outputs:
        assert outputs["freqs"].shape == (16, 8)
        assert not outputs["freqs"][3:].any()


def test_inspect_bundle_and_onnx(bundle):
    text = call("inspect", bundle).stdout
    assert "query: float32(batch_size, 2, seq_len, 8)" in text
    found = json.loads(call("inspect", bundle / "rotate.onnx", "--json").stdout)
    assert found["rotary nodes"] == 1
    assert found["rotary"][0]["op"] == "rotary_export::RotaryEmbedding"
    assert found["opsets"] == "rotary_export 1, ai.onnx 23"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("\x1b[31mred", "\\x1b[31mred"), ("\ud800", "\\ud800")],
    ids=["code", "half"],
)
def test_control_codes_of_a_file_are_escaped(bundle, tmp_path, name, shown):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    rotate = manifest["graphs"].pop("rotate")
    manifest |= {"name": name, "graphs": {name: rotate, "other": rotate}}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = call("inspect", copy)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"bundle: {shown}\n")
    assert f"\ngraph: {shown}\n" in result.stdout
    refused = call("run", copy, "--input", "a=1", "--out", tmp_path / "o.npz")
    assert f"it has {shown}, other" in refused.stderr
    assert json.loads(call("inspect", copy, "--json").stdout)["bundle"] == name


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


def test_doctor():
    result = call("doctor", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)["facts"]
    assert facts["CUDA"].startswith("no: ")
    assert facts["on the CPU"].startswith("fused (")


MISTAKES = {
    "no-command": (["nope"], "No such command 'nope'"),
    "no-dim": (["export", "--max-seq-len", "4", "--out", "x"], "--dim"),
    "odd-dim": (["export", "--dim", "7", "--max-seq-len", "4", "--out", "x"], "got 7"),
    "bad-dtype": ([*EXPORT, "--dtype", "int8", "--out", "x"], "int8"),
    "bad-opset": ([*EXPORT, "--opset", "12", "--out", "x"], "opset must be in [18, 25], got 12"),
    "not-a-bundle": (["verify", "."], "it has no manifest.json"),
    "no-file": (["inspect", "nope.onnx"], "nope.onnx does not exist"),
    "not-onnx": (["inspect", "text.onnx"], "text.onnx is not an ONNX file"),
    "no-input-file": (["run", "B", "--input", "query=no.npy", "--out", "o.npz"], "no.npy"),
    "not-npy": (["run", "B", "--input", "query=text.onnx", "--out", "o.npz"], "text.onnx"),
    "no-name": (["run", "B", "--input", "q.npy", "--out", "o.npz"], "--input NAME=q.npy"),
    "not-npz": (["run", "B", "--input", "zip.npz", "--out", "o.npz"], "zip.npz is not a plain"),
    "objects": (["run", "B", "--input", "objects.npz", "--out", "o.npz"], "objects.npz is not a"),
    "not-an-integer": (
        ["run", "B", "--input", "seq_len=--5", "--out", "o.npz"],
        "--5 does not",
    ),
    "twice": (
        ["run", "B", "--input", "query=q.npy", "--input", "query=q.npy", "--out", "o.npz"],
        "'query' is given twice",
    ),
    "missing-input": (["run", "B", "--input", "query=q.npy", "--out", "o.npz"], "'key'"),
    "no-folder": (
        ["run", "B", "--graph", "tables", "--input", "seq_len=3", "--out", "no/o.npz"],
        "no/o.npz can't be written",
    ),
    "no-graph": (["run", "B", "--graph", "x", "--input", "a=1", "--out", "o.npz"], "'x'"),
    "no-cuda": (
        ["run", "B", "--provider", "CUDAExecutionProvider", "--input", "a=1", "--out", "o.npz"],
        "CUDAExecutionProvider can't run here",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_gets_one_line_and_exit_code_2(name, bundle, tmp_path, monkeypatch):
    arguments, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    Path("text.onnx").write_text("this is text")
    np.save("q.npy", np.zeros((1, 2, 1, 8), np.float32))
    np.savez("objects.npz", a=np.array([{}], dtype=object))
    Path("zip.npz").write_bytes(b"PK\x03\x04 and no more")
    before = sorted(os.listdir())
    result = call(*[bundle if a == "B" else a for a in arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert sorted(os.listdir()) == before


MODEL = ["export-model", "slow:make", "--quick"]  # the factory must not be called
TOO_LATE = {
    "export-opset": ([*EXPORT, "--opset", "26", "--out", "new"], "opset must be in [18, 25]"),
    "export-out": ([*EXPORT, "--out", "mine"], "mine exists and is not a bundle"),
    "export-bundle": ([*EXPORT, "--out", "B"], "B exists; force=True (--force) replaces it"),
    "export-folder": ([*EXPORT, "--out", "file/new"], "file/new can't be written: Not a directory"),
    "model-opset": ([*MODEL, "--opset", "17", "--out", "new"], "opset must be in [18, 25]"),
    "model-opset-dry": ([*MODEL, "--opset", "17", "--dry-run"], "opset must be in [18, 25]"),
    "model-out": ([*MODEL, "--out", "mine", "--force"], "mine exists and is not a bundle"),
    "model-bundle": ([*MODEL, "--out", "B"], "B exists; force=True"),
    "model-folder": ([*MODEL, "--out", "file/new"], "file/new can't be written"),
    "model-kept": ([*MODEL, "--out", "new", "--keep-failed", "mine"], "mine exists and is not"),
    "deploy-out": (["deploy", "node", "B", "--out", "mine"], "deploy did not write it"),
    "deploy-folder": (["deploy", "node", "B", "--out", "file/kit"], "file/kit can't be written"),
    "run-out": (["run", "B", "--input", "a=1", "--out", "file"], "file exists; force=True"),
    "run-folder": (["run", "B", "--input", "a=1", "--out", "no/o.npz"], "no/o.npz can't be"),
    "fuse-folder": (["fuse", "in.onnx", "no/o.onnx"], "no/o.onnx can't be written: No such file"),
    "fuse-out": (["fuse", "in.onnx", "file"], "file exists; force=True"),
}


@pytest.mark.parametrize("name", TOO_LATE)
def test_what_is_written_is_checked_before_anything_is_loaded(name, bundle, tmp_path, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("loaded")

    arguments, message = TOO_LATE[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("slow.py").write_text("raise SystemError('imported')\n")
    Path("file").touch()
    Path("mine").mkdir()
    Path("mine", "notes.txt").touch()
    shutil.copytree(bundle, "B")
    for module, attribute in (
        ("rotary_export.models.source", "load_source"),
        ("rotary_export.exporters.export", "check_config"),
        ("rotary_export.deploy.deploy", "check_files"),
        ("rotary_export.cli.arrays", "read_inputs"),
    ):
        monkeypatch.setattr(f"{module}.{attribute}", refuse)
    monkeypatch.setattr("rotary_export.cli.export._make_rope", refuse)
    before = sorted(tmp_path.rglob("*"))
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1  # no progress before it
    assert sorted(tmp_path.rglob("*")) == before


def test_mistake_in_json(tmp_path):
    result = call("verify", tmp_path, "--json")
    assert result.exit_code == 2
    assert "it has no manifest.json" in json.loads(result.stdout)["error"]


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


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("rotary-export exp", ["export", "export-model"]),
        ("rotary-export export --format t", ["torchscript"]),
        ("rotary-export deploy cpp-", ["cpp-onnxruntime", "cpp-libtorch", "cpp-aoti"]),
        ("rotary-export serve --engine r", ["ray"]),
    ],
)
def test_shell_completion(words, completions):
    environment = {
        "_ROTARY_EXPORT_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    result = CliRunner().invoke(cli, prog_name="rotary-export", env=environment)
    assert result.stdout.splitlines() == [f"plain,{word}" for word in completions]


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_has_help(name):
    result = call(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: cli {name} ")
    for example in EXAMPLES[name]:
        assert f"\n    {example}\n" in result.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_is_a_command_with_its_options(name):
    assert len(EXAMPLES[name]) == 2
    for example in EXAMPLES[name]:
        program, *arguments = shlex.split(example)
        assert program == "rotary-export"
        assert name in ("cli", arguments[0])
        if "--help" not in arguments:
            command = cli.commands[arguments[0]]
            command.make_context(arguments[0], arguments[1:])  # raises for an unknown option


def test_the_help_of_the_program_has_examples():
    text = call("--help").stdout
    assert all(f"\n    {example}\n" in text for example in EXAMPLES["cli"])


def test_missing_click_is_reported(tmp_path):
    blocker = "import sys; sys.modules['click'] = None\n"
    code = f"{blocker}from rotary_export.__main__ import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr == (
        "the command line needs click: pip install '.[cli]' in the checkout of rotary_export, "
        "or 'FILE.whl[cli]' with its wheel\n"
    )


@pytest.mark.parametrize("name", ["export", "RotaryEmbedding", "fuse"])
def test_missing_torch_is_reported(name):
    missing = "onnx" if name == "fuse" else "torch"
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom rotary_export import {name}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: rotary_export.{name} needs {missing}: pip install '.[export]' in "
        "the checkout of rotary_export, or 'FILE.whl[export]' with its wheel"
    )
