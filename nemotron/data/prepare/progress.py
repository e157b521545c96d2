"""How far a preparation has come, with its rate and the time that is left."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

LINE_EVERY_S = 10.0
"""Seconds between two lines where there is no terminal."""


class PrepareProgress:
    """Bytes of input done: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._first, self._now = total, done, done
        self._start = self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._bar = Bar(
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "PrepareProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, size: int) -> None:
        """Count more bytes."""
        self._show(self._now + size)

    def reach(self, size: int) -> None:
        """Set the bytes done since the start of this command."""
        self._show(self._first + size)

    def _show(self, now: int) -> None:
        self._now = now
        self._bar.update(self._task, completed=now)
        time_now = time.monotonic()
        if not self._bar.disable or time_now - self._last_line < LINE_EVERY_S:
            return
        self._last_line = time_now
        rate = (now - self._first) / (time_now - self._start)
        left = (self._total - now) / rate if rate else float("inf")
        share = now / self._total if self._total else 0.0
        print(
            f"{now / 1e6:,.0f} of {self._total / 1e6:,.0f} MB ({share:.0%}), "
            f"{rate / 1e6:.2f} MB/s, {left:,.0f} s left",
            file=sys.stderr,
        )
