"""What lies in a folder at each moment at which a command could be killed."""

import os
import shutil
import sys
from pathlib import Path

from nemotron.cli import run

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch_moments(words: list[str], folder: Path, copies: Path) -> int:
    """Run a command, and copy the folder before each of its changes there.

    A copy has what the system got until then, as after SIGKILL; what a program still holds back in
    memory is not in it. Another one follows for a file that is opened to be written, in which it is
    there and empty. Copies are named by their number.
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
        number += 1
        if is_write:
            opened = copies / str(number) / Path(str(arguments[0])).relative_to(folder)
            shutil.copytree(folder, copies / str(number), symlinks=True)
            if not opened.exists() or arguments[2] & os.O_TRUNC:
                opened.write_bytes(b"")
            number += 1
        is_copying = False

    sys.addaudithook(watch)  # stays, so this process has no other use
    code = run(words)
    is_copying = True
    return code
