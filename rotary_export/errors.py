"""The exceptions of the package, and how text of other people's files is shown."""

from collections.abc import Iterator
from contextlib import contextmanager


def escape(text: str) -> str:
    """Return a text without control codes, line ends and halves of surrogates: one line.

    Names and messages in files of others must reach neither a terminal nor a log as they are.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class RotaryExportError(ValueError):
    """A user's mistake or an unusable file: one sentence that names the thing and the value.

    Args:
        message: The sentence; what it quotes of a file is escaped here.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(escape(message.strip().replace("\n", " ")))


class CheckFailedError(RotaryExportError):
    """A bundle is not what it should be: a file's hash or a result's tolerance is broken."""


class UsageWarning(UserWarning):
    """A bundle is right, but easy to use wrongly; its report has the same sentence as a note."""


class InterruptedWarning(UserWarning):
    """An earlier run was interrupted; the message names what it left and what was done with it."""


@contextmanager
def explain_damage(what: str) -> Iterator[None]:
    """Turn what a file of unexpected contents raises into one clear error.

    Args:
        what: What can't be done with which file.

    Raises:
        RotaryExportError: With `what`, and what was found.
    """
    try:
        yield
    except RotaryExportError:
        raise
    except Exception as error:  # KeyError, DecodeError, RuntimeError, ... by the damage
        if isinstance(error, OSError):
            raise RotaryExportError(f"{what}: {first_line(error)}") from error
        found = f"{type(error).__name__}: {first_line(error)}"
        raise RotaryExportError(f"{what}, its contents do not fit: {found}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
