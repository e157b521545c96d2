"""A disk of few MiB, for what happens when it is full; mounting one needs root."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE = "10m"


@contextmanager
def small_disk(folder: Path, size: str = SIZE) -> Iterator[Path]:
    """Mount an empty disk at a folder; the test is skipped where that is not allowed."""
    folder.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
    mounted = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class Filler:
    """A file that takes all the room that a disk has left."""

    def __init__(self, disk: Path) -> None:
        self.path = disk / "filler"
        with open(self.path, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)

    def remove(self) -> None:
        """Give the room back."""
        os.unlink(self.path)
