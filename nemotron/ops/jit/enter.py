"""Where a thread of an OpenMP library enters a kernel: it asks for its number and calls it."""

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from nemotron.ops.jit.scalars import integers

_I32, _I64, _POINTER = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


def _function(b, address, arguments):
    kind = ir.FunctionType(_I32, [argument.type for argument in arguments])
    return b.call(b.inttoptr(address, kind.as_pointer()), arguments)


@intrinsic
def _ask(context, function):
    """Return what a function without arguments says."""

    def generate(context, b, signature, arguments):
        return b.sext(_function(b, arguments[0], []), _I64)

    return types.int64(types.int64), generate


@intrinsic
def _call(context, function, record, thread, threads):
    """Call a kernel's machine code, as `native.call` does, and return its status."""

    def generate(context, b, signature, arguments):
        function, *numbers = arguments
        places = [b.alloca(_POINTER), b.alloca(_POINTER)]
        for place in places:
            b.store(_POINTER(None), place)
        return _function(b, function, [*places, *numbers, _POINTER(None)])

    return types.int32(*[types.int64] * 4), generate


@cfunc(types.void(types.int64), cache=True)
def enter(work):
    """Do a thread's part; `work` is the address of a kernel's address, that of its record, those of
    functions that return the thread's number and how many there are, and whether it failed."""
    values = integers(work, 5)
    if _call(values[0], values[1], _ask(values[2]), _ask(values[3])) != 0:
        values[4] = 1
