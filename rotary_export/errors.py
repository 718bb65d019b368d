"""The exceptions of the package."""


class RotaryExportError(ValueError):
    """A user's mistake or an unusable file: one sentence that names the thing and the value."""


class CheckFailedError(RotaryExportError):
    """A bundle is not what it should be: a file's hash or a result's tolerance is broken."""


class UsageWarning(UserWarning):
    """A bundle is right, but easy to use wrongly; its report has the same sentence as a note."""


class InterruptedWarning(UserWarning):
    """An earlier run was interrupted; the message names what it left and what was done with it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
