"""Where threads wait for each other: without the system as long as all of them run."""

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

SPINS = 4000
"""Looks at the counter before a thread gives its core to another program."""

_I64 = ir.IntType(64)


@intrinsic
def _add(context, address, amount):
    def generate(context, b, signature, arguments):
        place = b.inttoptr(arguments[0], _I64.as_pointer())
        return b.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _read(context, address):
    def generate(context, b, signature, arguments):
        place = b.inttoptr(arguments[0], _I64.as_pointer())
        return b.load_atomic(place, "acquire", 8)

    return types.int64(types.int64), generate


_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@njit
def wait(counter, threads):
    """Return when all threads have come; `counter` is the address of an int64 that only grows."""
    if threads == 1:
        return
    last = (_add(counter, 1) // threads + 1) * threads
    spins = 0
    while _read(counter) < last:
        spins += 1
        if spins >= SPINS:
            _sched_yield()
            spins = 0


@njit
def take(counter):
    """Return what a counter, an int64 at an address, says, and count on: for the next unit."""
    return _add(counter, 1)
