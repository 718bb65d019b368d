"""`rotary-export` and `python -m rotary_export`."""

import sys


def main() -> None:
    """Run the command line; it needs click and rich, which a deployment does without."""
    try:
        from rotary_export.cli import cli
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f"the command line needs {error.name}: pip install 'rotary_export[cli]'")
    cli(prog_name="rotary-export")


if __name__ == "__main__":
    main()
