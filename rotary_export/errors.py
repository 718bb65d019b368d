"""The exceptions of the package."""


class RotaryExportError(ValueError):
    """A user's mistake or an unusable file: one sentence that names the thing and the value."""


class CheckFailedError(RotaryExportError):
    """A bundle is not what it should be: a file's hash or a result's tolerance is broken."""
