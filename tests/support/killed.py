"""A command that ends without warning at some change of the file system."""

import os
import sys
from pathlib import Path

from nemotron.cli import run

KILLED = 137
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def run_until(words: list[str], folder: Path, moment: int, counted: Path) -> int:
    """Run a command that ends before the `moment`-th change below `folder`; 0 never comes.

    The number of changes is written into `counted`.
    """
    changes = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal changes
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if not is_write and event not in CHANGES:
            return
        if not str(arguments[0]).startswith(str(folder)):
            return
        changes += 1
        if changes == moment:
            os._exit(KILLED)

    sys.addaudithook(watch)  # stays, so this process has no other use
    code = run(words)
    number, changes = changes, -1
    counted.write_text(str(number))
    return code
