"""The panel in a pseudo terminal that changes its size, and Ctrl-C in it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

TOP, BOTTOM = "╭", "╯"
PROGRAM = """
import sys, time
from nemotron.run.screen import Screen
from nemotron.run.signals import StopRequest
screen = Screen()
with StopRequest() as stop:
    stop.say = screen.say_at_once
    screen.start("run", 10**6)
    for step in range(1, 10**6):
        screen.show({"kind": "train", "step": step, "loss/main": 1 / step, "mem/rss_gib": 1.5,
                     "perf/tokens_per_s": 12345.6, "perf/step_s": 0.9, "grad_norm/total": 1.25})
        if stop.is_due(step):
            break
        time.sleep(0.02)
    screen.stop()
    print("stopped by", stop.signal)
    sys.exit(75)
"""


class Terminal:
    """A program in a pseudo terminal, and all that it has written so far."""

    def __init__(self, columns: int) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(columns)
        root = Path(__file__).parents[2]
        other = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
        kept = {key: value for key, value in os.environ.items() if key not in other}
        try:
            self.process = subprocess.Popen(
                ["setsid", "--ctty", "--wait", sys.executable, "-P", "-c", PROGRAM],
                env=kept | {"TERM": "xterm-256color", "PYTHONPATH": str(root)},
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
            )
        finally:
            os.close(theirs)
        self.text, self._raw = "", b""

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self._ours, text)

    def read_until(self, pattern: str, start: int = 0) -> re.Match:
        while (found := re.compile(pattern, re.DOTALL).search(self.text, start)) is None:
            try:
                self._raw += os.read(self._ours, 1 << 16)
            except OSError:  # the program has ended
                pytest.fail(f"{pattern!r} did not come: {self.text[start:]!r}")
            self.text = self._raw.decode(errors="ignore")
        return found

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def widths(text: str) -> set[int]:
    """Return the widths of the lines of a panel, without what only moves the cursor."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text)
    return {len(line) for line in plain.splitlines() if line}


@pytest.mark.timeout(300)
def test_the_panel_survives_new_sizes_and_ctrl_c_and_leaves_whole_lines():
    with Terminal(100) as terminal:
        place = 0
        for columns in (100, 64, 140):
            terminal.resize(columns)
            top = f"{TOP}[^{TOP}{BOTTOM}]{{{columns - 2}}}╮"
            found = terminal.read_until(f"({top}[^{TOP}{BOTTOM}]*{BOTTOM}).*?{TOP}", place)
            assert widths(found[1]) == {columns}
            before = terminal.text[max(place, found.start() - 200) : found.start()]
            assert columns == 100 or not before.endswith(
                "\x1b[2K"
            )  # below the old one, not over it
            place = found.end()
        terminal.type(b"\x03")
        said = terminal.read_until("Ctrl-C again leaves at once\r\n", place)
        after = terminal.read_until(
            f"([^{TOP}]*){TOP}[^{BOTTOM}]*{BOTTOM}.*stopped by SIGINT\r\n", said.end()
        )
        assert "\x1b[1A" not in after[1]  # nothing goes up to overwrite the sentence
        assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")
        assert terminal.process.wait() == 75
