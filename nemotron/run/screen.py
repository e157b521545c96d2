"""Output of a run: a live panel or plain lines, and log.txt in both cases."""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, ConsoleDimensions
from rich.live import Live

from nemotron.run.appended import AppendedFile
from nemotron.run.metrics import Record
from nemotron.run.panel import Progress, suites_text
from nemotron.run.redaction import redact_text
from nemotron.run.signals import write_error
from nemotron.terminal import printable


class Screen:
    """Prints events and steps; a terminal or pipe that closes never stops the run."""

    def __init__(
        self, stream: TextIO | None = None, *, is_silent: bool = False, panel: bool | None = None
    ) -> None:
        """Print to a stream, by default that of `print`; if silent, only to log.txt.

        `panel` says whether steps are shown as a panel; by default, a capable terminal gets one.
        """
        self._stream: TextIO | None = stream if stream is not None else sys.stdout
        if is_silent:
            self._stream = None
        self.log: AppendedFile | None = None
        self._panel = panel
        self._early: list[str] = []
        self._progress: Progress | None = None
        self._live: Live | None = None
        self._size: ConsoleDimensions | None = None
        self._is_drawing = self._is_displaced = False
        self._unsaid: str | None = None
        self._handler = _Forward(self.info)
        logger = logging.getLogger("nemotron")
        self._level_before = logger.level
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)

    def open_log(self, path: Path) -> None:
        """Append everything said so far, and from now on, to a file.

        Raises:
            UserError: when it is a link, a pipe or a device.
        """
        self.log = AppendedFile(path)
        for line in self._early:
            self._to_log(line)
        self._early.clear()

    def start(
        self, title: str, num_steps: int, part: Callable[[int], str] = lambda step: ""
    ) -> None:
        """Begin to show steps: as a panel when the stream is a capable terminal.

        `part` names the part of the schedule in which a step is, counted from 0.
        """
        self._progress = Progress(printable(title), num_steps, lambda step: printable(part(step)))
        if self._stream is None:
            return
        console = Console(file=self._stream, force_terminal=self._panel or None)
        is_able = console.is_terminal and not console.is_dumb_terminal
        if is_able if self._panel is None else self._panel:
            # no refresh thread: it would compete with the step for the cores
            self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
            self._guard(self._live.start)

    def show(self, record: Record) -> None:
        """Show one line of metrics.jsonl."""
        assert self._progress is not None, "start comes first"
        self._progress.update(record)
        if record["kind"] == "train":
            self._to_log(self._progress.line())
            if self._live is None:
                self._print(self._progress.line(self._columns()))
        elif record["kind"] == "validation":
            self.info(_validation_line(record))
        elif record["kind"] == "suites":
            self.info(f"step {record['step']}: {suites_text(record)}")
        elif record["kind"] == "event":
            self.info(f"step {record['step']}: {record['event']}")
        self._refresh()

    def info(self, text: str) -> None:
        """Print a line and append it to log.txt, without secrets and what a terminal would obey."""
        text = printable(redact_text(text))
        self._to_log(text)
        if self._live is not None and self._progress is not None:
            self._progress.info(text)
            self._refresh()
        else:
            self._print(text)

    def say_at_once(self, sentence: str) -> None:
        """Write a line to the error stream, below the panel; for the handler of a signal.

        Raises:
            OSError: when the terminal is gone.
        """
        if self._is_drawing:
            self._unsaid = sentence  # else the panel, half drawn, would cover it
        else:
            write_error(sentence)
            self._is_displaced = True

    def stop(self) -> None:
        """Stop updating the panel; later lines are printed below it."""
        if self._live is not None:
            self._draw(self._live, self._live.stop)
            self._live = None

    def close(self) -> None:
        """Stop, and close the log."""
        self.stop()
        logger = logging.getLogger("nemotron")
        if self._handler in logger.handlers:
            logger.removeHandler(self._handler)
            logger.setLevel(self._level_before)
        if self.log is not None:
            self.log.close()
            self.log = None

    def _columns(self) -> int | None:
        is_terminal = self._stream is not None and self._stream.isatty()
        return shutil.get_terminal_size().columns if is_terminal else None

    def _refresh(self) -> None:
        if self._live is not None and self._progress is not None:
            live, panel = self._live, self._progress.render()
            self._draw(live, lambda: live.update(panel, refresh=True))

    def _draw(self, live: Live, write: Callable[[], Any]) -> None:  # Any: the result is not used
        self._is_drawing = True
        self._guard(lambda: self._leave_displaced(live))
        self._guard(write)
        self._is_drawing = False
        if self._unsaid is not None:
            sentence, self._unsaid = self._unsaid, None
            self._guard(lambda: self.say_at_once(sentence))

    def _leave_displaced(self, live: Live) -> None:
        """Let a panel stay from which the cursor was moved: by a line, or by a new size.

        Rich would go up as many lines as it has drawn, and overwrite others.
        """
        size, before, displaced = live.console.size, self._size, self._is_displaced
        self._size, self._is_displaced = size, False
        if displaced or before not in (None, size):
            live._live_render._shape = None
            if not displaced:
                live.console.file.write("\n")

    def _print(self, text: str) -> None:
        if self._stream is not None:
            stream = self._stream
            encoding = stream.encoding or "utf-8"
            known = text.encode(encoding, errors="replace").decode(encoding)
            self._guard(lambda: print(known, file=stream, flush=True))

    def _guard(self, write: Callable[[], Any]) -> None:  # Any: the result is not used
        """Write; when the reader is gone, never write there again."""
        try:
            write()
        except (OSError, ValueError):  # a broken pipe or terminal; a closed file
            stream, self._stream, self._live = self._stream, None, None
            if stream is sys.stdout:
                # else Python complains once more while it flushes at exit
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until exit)

    def _to_log(self, text: str) -> None:
        if self.log is None:
            self._early.append(text)
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self.log.write(f"{stamp}  {text}\n".encode(errors="backslashreplace"))


class _Forward(logging.Handler):
    """Sends the messages of the lower packages to the screen."""

    def __init__(self, info: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._info = info

    def emit(self, record: logging.LogRecord) -> None:
        self._info(record.getMessage())


def _validation_line(record: Record) -> str:
    if (reward := record.get("validation/reward")) is not None:
        return f"step {record['step']}: validation reward {reward:.3f}"
    if "validation/loss" not in record:
        return f"step {record['step']}: no held-out token counts for a validation loss"
    parts = [f"step {record['step']}: validation loss {record['validation/loss']:.4f}"]
    for name, value in record.items():
        if name.startswith("validation/") and name.endswith("bits_per_byte"):
            domain = name.removeprefix("validation/").removesuffix("bits_per_byte").rstrip("/")
            parts.append(f"{domain or 'all'} {value:.3f}")
    if (accuracy := record.get("validation/accuracy")) is not None:
        return f"{parts[0]}  accuracy {accuracy:.3f}"
    return "  ".join(parts[:1]) + "  bits/byte: " + ", ".join(parts[1:])
