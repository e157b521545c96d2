"""What lies in a folder at each moment at which a command could be killed."""

import shutil
import sys
from pathlib import Path

from nemotron.cli import run
from tests.support.killed import CHANGES, WRITES


def watch_moments(words: list[str], folder: Path, copies: Path) -> int:
    """Run a command, and copy the folder before each of its changes there.

    A copy has what the system got until then, as after SIGKILL; what a program still holds back in
    memory is not in it. Copies are named by their number.
    """
    is_copying = False
    number = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal is_copying, number
        if is_copying:
            return
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if not is_write and event not in CHANGES:
            return
        if not str(arguments[0]).startswith(str(folder)):
            return
        is_copying = True
        shutil.copytree(folder, copies / str(number), symlinks=True)
        number, is_copying = number + 1, False

    sys.addaudithook(watch)  # stays, so this process has no other use
    code = run(words)
    is_copying = True
    return code
