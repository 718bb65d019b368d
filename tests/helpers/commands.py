"""Commands, called in this process."""

from click.testing import CliRunner, Result

from rotary_export.cli.main import cli

EXPORT = ["export", "--dim", "8", "--use-xpos", "--max-seq-len", "16", "--num-heads", "2"]


def call(*arguments: object) -> Result:
    """Call the program with these arguments."""
    return CliRunner().invoke(cli, [str(a) for a in arguments])
