"""Stopping when asked or when it is time: finish the step, save, leave.

At the second Ctrl-C a run leaves at once.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from nemotron.exit_codes import INTERRUPTED

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, a scheduler's termination, and SLURM's warning before the end of the time limit."""


def interrupt_safely() -> None:
    """Let Ctrl-C in the middle of an import end the process at once; elsewhere it raises.

    Libraries swallow an exception that comes while they load, abort, or show a traceback. Who
    ignores Ctrl-C, as a process in the background of a shell does, goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_an_import)


def _leave_an_import(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def write_error(sentence: str) -> None:
    """Write a line to the error stream, past Python's buffers, which a handler may not touch."""
    os.write(2, f"\n{sentence}\n".encode())


class StopRequest:
    """Remembers the first stop signal while it is entered; restores the handlers afterwards.

    A run may also be asked at its start to stop after so many steps, and its recipe may say when
    it stops. The latter lets every start do at least one step, so that a chain of them gets on.
    """

    def __init__(
        self,
        after: int | None = None,
        *,
        after_minutes: float | None = None,
        every_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count minutes, by a clock in seconds."""
        self.signal: str | None = None
        self.before_leaving: Callable[[], None] = lambda: None
        """Called before the second Ctrl-C ends the process."""
        self.say: Callable[[str], None] = write_error
        """Shows a sentence from within the handler of a signal."""
        self._after, self._minutes, self._every = after, after_minutes, every_steps
        self._clock, self._began, self._first_step = clock, clock(), 0

    def begin(self, steps: int) -> bool:
        """Say whether this process was asked to stop before it does a step, after so many."""
        self._first_step = steps
        return self.is_due(steps)

    def is_due(self, steps: int) -> bool:
        """Say whether this process was asked to stop, when so many steps are done."""
        return self.reason(steps) is not None

    def reason(self, steps: int) -> str | None:
        """Say who asked to stop, when so many steps are done; None when there was no request."""
        if self.signal is not None:
            return self.signal
        if self._after is not None and steps >= self._after:
            return f"--stop-at {self._after}"
        if steps <= self._first_step:
            return None
        if self._minutes is not None and self._clock() - self._began >= 60 * self._minutes:
            return f"stop.after_minutes = {self._minutes:g}"
        if self._every is not None and steps % self._every == 0:
            return f"stop.every_steps = {self._every}"
        return None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            with contextlib.suppress(Exception):  # nothing may keep the process from ending
                self.before_leaving()
            if sys.__stdout__ is not None and sys.__stdout__.isatty():
                os.write(sys.__stdout__.fileno(), b"\x1b[?25h\n")  # the panel hides the cursor
            os._exit(INTERRUPTED)
        self.signal = self.signal or signal.Signals(number).name
        with contextlib.suppress(OSError):  # the terminal may be gone
            self.say("stopping after this step; Ctrl-C again leaves at once")
