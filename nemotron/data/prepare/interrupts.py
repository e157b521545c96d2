"""Ctrl-C while worker processes run: it reaches the parent, which ends them from one place."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def noted() -> Iterator[list[int]]:
    """Yield a list that a Ctrl-C is noted in, which takes effect at the end; a second one does now.

    So it never interrupts what cannot be: a process that is just being started, a queue's lock.
    """
    found: list[int] = []

    def note(number: int, _frame: object) -> None:
        if found:
            raise KeyboardInterrupt
        found.append(number)

    handler = signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, handler)
        if found:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def blocked() -> Iterator[None]:
    """Block Ctrl-C in processes that are started meanwhile.

    A worker that only ignored it once it runs would print a traceback when it still imports.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
