"""Children of the fuzzer, which write into files: how long they work, and how large they are."""

import contextlib
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from select import select
from typing import NoReturn

LIMIT_KIB = 2 << 20
POLL_S = 0.05


def watch(child: int, results: int, limit_s: float) -> str | None:
    """Wait until the child says something; returns what is wrong with it instead.

    Polls are counted instead of seconds: a pause of the whole machine does not count as a hang.
    """
    for _ in range(round(limit_s / POLL_S)):
        if select([results], [], [], POLL_S)[0]:
            return None
        if _resident_kib(child) > LIMIT_KIB:
            return "bomb"
    return "hangs"


def largest_kib() -> int:
    """Return the largest size so far of this process, and of those that it waited for."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whose)


def _resident_kib(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 10


def fork(function: Callable[[], int], output: Path) -> int:
    """Call the function in a child whose output goes to a file; its result is the exit code."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    _become_child(function, output)


def _become_child(function: Callable[[], int], output: Path) -> NoReturn:
    code = 101
    try:
        os.setpgid(0, 0)
        target = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (open until the end)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        code = function()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 101)


def cpu_s() -> float:
    """Return what the children that ended have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
