"""`rotary-export` and `python -m rotary_export`."""

import signal
import sys


def main() -> None:
    """Run the command line; it needs click and rich, which a deployment does without."""
    try:
        from rotary_export.cli.main import cli
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f"the command line needs {error.name}: pip install 'rotary_export[cli]'")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # clean up, then go
    cli(prog_name="rotary-export")


if __name__ == "__main__":
    main()
