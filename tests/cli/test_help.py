"""Help, its examples, and shell completion."""

import shlex

import pytest
from click.testing import CliRunner
from helpers.commands import call

from rotary_export.cli.examples import EXAMPLES
from rotary_export.cli.main import cli


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
