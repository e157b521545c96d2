"""The start of the program: what must be right before anything is imported."""

# ruff: noqa: E402 (the search for modules must be right before the first of them is sought)

import os

from nemotron.children import leave_current_folder

leave_current_folder()

from nemotron.exit_codes import INTERRUPTED
from nemotron.run.signals import interrupt_safely
from nemotron.terminal import open_streams


def main() -> None:
    """Run the command line."""
    try:
        open_streams()
        interrupt_safely()
        from nemotron.cli import main as run

        run()
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
