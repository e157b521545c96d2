"""The start of the program: what must be right before anything is imported."""

import os

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
