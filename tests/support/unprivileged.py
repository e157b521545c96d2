"""Permissions that bind root, too, as they bind other users."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

VERSION = 0x20080522
OVERRIDES = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: root reads and writes whatever the permissions say."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Let this thread, and threads that it starts, do without the rights of root over files.

    Source: capabilities(7), capset(2).
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, sets: ctypes.Array[_Sets]) -> None:
        if getattr(libc, name)(ctypes.byref(_Header(VERSION, 0)), sets):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    sets = (_Sets * 2)()
    call("capget", sets)
    before = sets[0].effective
    sets[0].effective = before & ~OVERRIDES
    call("capset", sets)
    try:
        yield
    finally:
        sets[0].effective = before
        call("capset", sets)
