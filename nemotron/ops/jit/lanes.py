"""Vectors as values in compiled functions: sixteen float32 numbers that are worked on together."""

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from nemotron.ops.jit.vectors import (
    _F32,
    _I16,
    _I32,
    _VECTOR,
    LANES,
    _fma,
    _is_bf16,
    _load,
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
        b.store(vector, b.inttoptr(address, vector.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, _lanes, kind), generate


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


@overload(operator.add)
def _added(x, y):
    if isinstance(x, _Lanes) and isinstance(y, _Lanes):
        return lambda x, y: _add(x, y)
    return None


@overload(operator.mul)
def _multiplied(x, y):
    if isinstance(x, _Lanes) and isinstance(y, _Lanes):
        return lambda x, y: _multiply(x, y)
    return None


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
