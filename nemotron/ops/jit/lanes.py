"""Vectors as values in compiled functions: sixteen float32 numbers that are worked on together."""

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from nemotron.ops.jit import powers
from nemotron.ops.jit.vectors import (
    _F32,
    _I16,
    _I32,
    _I64,
    _VECTOR,
    LANES,
    _at,
    _fma,
    _function,
    _is_bf16,
    _load,
    _pointer,
    _splat,
    _store,
    _sum_lanes,
    _zero,
)

_BITS = ir.VectorType(_I32, LANES)


class _Lanes(types.Type):
    def __init__(self):
        super().__init__("nemotron_lanes")


_lanes = _Lanes()


@register_model(_Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _VECTOR)


def _all(value):
    return ir.Constant(_BITS, [value] * LANES)


@intrinsic
def zeros(context):
    """Return a vector of zeros."""
    return _lanes(), lambda context, b, signature, arguments: _zero()


@intrinsic
def splat(context, number):
    """Return a vector of one float32 number."""
    return _lanes(types.float32), lambda context, b, signature, arguments: _splat(b, arguments[0])


@intrinsic
def load(context, address):
    """Return the float32 numbers at an address."""
    return _lanes(types.int64), lambda context, b, signature, arguments: _load(b, arguments[0])


@intrinsic
def store(context, address, vector):
    """Write float32 numbers to an address."""

    def generate(context, b, signature, arguments):
        _store(b, arguments[1], arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64, _lanes), generate


@intrinsic
def read(context, address, kind):
    """Return the numbers of a format at an address."""

    def generate(context, b, signature, arguments):
        return _load(b, arguments[0], bf16=_is_bf16(kind))

    return _lanes(types.int64, kind), generate


def _copy(b, source, target, count, kind):
    """Copy some numbers; a call, since it is rare and would take registers from what is not."""

    def fill(b, arguments):
        source, target, count = arguments
        with cgutils.for_range(b, count, intp=_I64) as loop:
            offset = b.mul(loop.index, _I64(size))
            b.store(b.load(_pointer(b, _at(b, source, offset), bits), align=size),
                    _pointer(b, _at(b, target, offset), bits), align=size)  # fmt: skip
        b.ret_void()

    bits, size = (_I16, 2) if _is_bf16(kind) else (_I32, 4)
    copy = _function(b.module, f"nemotron_copy_{size}", [_I64] * 3, fill)
    b.call(copy, [source, target, count])


def _room(b, kind):
    return cgutils.alloca_once(b, ir.VectorType(_I16 if _is_bf16(kind) else _I32, LANES))


@intrinsic
def read_some(context, address, count, kind):
    """Return the first numbers of a format at an address, sixteen at most, and 0 behind them."""

    def generate(context, b, signature, arguments):
        address, count, _ = arguments
        room, result = _room(b, kind), cgutils.alloca_once(b, _VECTOR)
        is_whole = b.icmp_signed(">=", count, _I64(LANES))
        with b.if_else(is_whole, likely=True) as (whole, some):
            with whole:
                b.store(_load(b, address, bf16=_is_bf16(kind)), result)
            with some:
                b.store(ir.Constant(room.type.pointee, None), room)
                place = b.ptrtoint(room, _I64)
                _copy(b, address, place, count, kind)
                b.store(_load(b, place, bf16=_is_bf16(kind)), result)
        return b.load(result)

    return _lanes(types.int64, types.int64, kind), generate


def _narrow(b, vector):
    """Return bfloat16 numbers, rounded to nearest even; NaN stays NaN."""
    bits = b.bitcast(vector, _BITS)
    odd = b.and_(b.lshr(bits, _all(16)), _all(1))
    near = b.lshr(b.add(bits, b.add(odd, _all(0x7FFF))), _all(16))
    is_nan = b.fcmp_unordered("uno", vector, vector)
    return b.trunc(b.select(is_nan, _all(0x7FC0), near), ir.VectorType(_I16, LANES))


@intrinsic
def rounded(context, vector, given, kind):
    """Return numbers of the format `given` as those of another one."""
    is_same = _is_bf16(given) or not _is_bf16(kind)

    def generate(context, b, signature, arguments):
        if is_same:
            return arguments[0]
        wide = b.zext(_narrow(b, arguments[0]), _BITS)
        return b.bitcast(b.shl(wide, _all(16)), _VECTOR)

    return _lanes(_lanes, given, kind), generate


@intrinsic
def write(context, address, vector, kind):
    """Write numbers in a format to an address, rounded to nearest even."""

    def generate(context, b, signature, arguments):
        address, vector, _ = arguments
        vector = _narrow(b, vector) if _is_bf16(kind) else vector
        b.store(vector, _pointer(b, address, vector.type), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, _lanes, kind), generate


@intrinsic
def write_some(context, address, vector, count, kind):
    """Write the first numbers of a vector in a format to an address, sixteen at most."""

    def generate(context, b, signature, arguments):
        address, vector, count, _ = arguments
        vector, room = _narrow(b, vector) if _is_bf16(kind) else vector, _room(b, kind)
        is_whole = b.icmp_signed(">=", count, _I64(LANES))
        with b.if_else(is_whole, likely=True) as (whole, some):
            with whole:
                b.store(vector, _pointer(b, address, vector.type), align=2)
            with some:
                place = b.ptrtoint(room, _I64)
                b.store(vector, _pointer(b, place, vector.type), align=2)
                _copy(b, place, address, count, kind)
        return context.get_dummy_value()

    return types.void(types.int64, _lanes, types.int64, kind), generate


@intrinsic
def positive(context, vector):
    """Return what is above 0, and 0 for the rest; NaN stays NaN."""

    def generate(context, b, signature, arguments):
        (x,) = arguments
        return b.select(b.fcmp_unordered("ugt", x, _zero()), x, _zero())

    return _lanes(_lanes), generate


@intrinsic
def fma(context, x, y, z):
    """Return x y + z, rounded once."""

    def generate(context, b, signature, arguments):
        return _fma(b, *arguments)

    return _lanes(_lanes, _lanes, _lanes), generate


@intrinsic
def _add(context, x, y):
    return _lanes(_lanes, _lanes), lambda context, b, signature, arguments: b.fadd(*arguments)


@intrinsic
def _multiply(context, x, y):
    return _lanes(_lanes, _lanes), lambda context, b, signature, arguments: b.fmul(*arguments)


@intrinsic
def _subtract(context, x, y):
    return _lanes(_lanes, _lanes), lambda context, b, signature, arguments: b.fsub(*arguments)


@intrinsic
def _divide(context, x, y):
    return _lanes(_lanes, _lanes), lambda context, b, signature, arguments: b.fdiv(*arguments)


def _overload(sign, function):
    @overload(sign)
    def of_lanes(x, y):
        if isinstance(x, _Lanes) and isinstance(y, _Lanes):
            return lambda x, y: function(x, y)
        return None


_overload(operator.add, _add)
_overload(operator.sub, _subtract)
_overload(operator.mul, _multiply)
_overload(operator.truediv, _divide)


@intrinsic
def exp(context, vector):
    """Return e to the power of each number."""
    return _lanes(_lanes), lambda context, b, signature, arguments: powers.exp(b, arguments[0])


@njit
def sigmoid(x):
    """Return 1 / (1 + e^-x)."""
    one = splat(np.float32(1.0))
    return one / (one + exp(zeros() - x))


def _compare(b, sign, count):
    """Say of each lane's number how it compares with a count."""
    first = b.insert_element(ir.Constant(_BITS, ir.Undefined), b.trunc(count, _I32), _I32(0))
    counts = b.shuffle_vector(first, first, _all(0))
    return b.icmp_signed(sign, ir.Constant(_BITS, list(range(LANES))), counts)


@intrinsic
def one_at(context, lane):
    """Return a vector that is 1 in one lane and 0 in the others."""

    def generate(context, b, signature, arguments):
        ones = ir.Constant(_VECTOR, [_F32(1.0)] * LANES)
        return b.select(_compare(b, "==", arguments[0]), ones, _zero())

    return _lanes(types.int64), generate


@intrinsic
def first_lanes(context, vector, count):
    """Return a vector with zeros but in its first lanes, as many as `count` says."""

    def generate(context, b, signature, arguments):
        return b.select(_compare(b, "<", arguments[1]), arguments[0], _zero())

    return _lanes(_lanes, types.int64), generate


@intrinsic
def total(context, vector):
    """Return the sum of a vector's numbers: its upper half is added to its lower one, and so on."""

    def generate(context, b, signature, arguments):
        return _sum_lanes(b, arguments[0])

    return types.float32(_lanes), generate
