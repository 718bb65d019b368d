"""`rotary-export` and `python -m rotary_export`."""

import signal
import sys

from rotary_export.package import describe_missing


def main() -> None:
    """Run the command line; it needs click and rich, which a deployment does without."""
    try:
        from rotary_export.cli.main import cli
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(describe_missing("the command line", error.name, "cli"))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # clean up, then go
    cli(prog_name="rotary-export")


if __name__ == "__main__":
    main()
