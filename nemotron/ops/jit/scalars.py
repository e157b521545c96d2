"""Numbers and memory: views of addresses, number formats, and functions that become vectors."""

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

_F32, _I16, _I32 = ir.FloatType(), ir.IntType(16), ir.IntType(32)


@intrinsic
def _pointer(context, address):
    def generate(context, b, signature, arguments):
        return b.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@njit
def items(address, count, kind):
    """Return the numbers that begin at an address."""
    return carray(_pointer(address), (count,), kind)


@njit
def floats(address, count):
    """Return the float32 numbers that begin at an address."""
    return carray(_pointer(address), (count,), np.float32)


@njit
def doubles(address, count):
    """Return the float64 numbers that begin at an address."""
    return carray(_pointer(address), (count,), np.float64)


@njit
def integers(address, count):
    """Return the int64 numbers that begin at an address."""
    return carray(_pointer(address), (count,), np.int64)


@intrinsic
def item_size(context, kind):
    """Return the bytes of a number of a format."""
    size = 2 if kind.dtype == types.uint16 else 4

    def generate(context, b, signature, arguments):
        return ir.Constant(ir.IntType(64), size)

    return types.int64(kind), generate


@intrinsic
def decode(context, number):
    """Return a stored number as float32; one of 16 bits is a bfloat16."""

    def generate(context, b, signature, arguments):
        if number == types.float32:
            return arguments[0]
        return b.bitcast(b.shl(b.zext(arguments[0], _I32), _I32(16)), _F32)

    return types.float32(number), generate


@intrinsic
def _bits(context, number):
    def generate(context, b, signature, arguments):
        return b.bitcast(arguments[0], _I32)

    return types.int32(types.float32), generate


@intrinsic
def _from_bits(context, bits):
    def generate(context, b, signature, arguments):
        return b.bitcast(arguments[0], _F32)

    return types.float32(types.int32), generate


@intrinsic
def encode(context, value, kind):
    """Return a float32 number in a format, rounded to nearest even."""

    def generate(context, b, signature, arguments):
        value = arguments[0]
        if kind.dtype == types.float32:
            return value
        bits = b.bitcast(value, _I32)
        odd = b.and_(b.lshr(bits, _I32(16)), _I32(1))
        rounded = b.lshr(b.add(bits, b.add(odd, _I32(0x7FFF))), _I32(16))
        is_nan = b.fcmp_unordered("uno", value, value)
        return b.trunc(b.select(is_nan, _I32(0x7FC0), rounded), _I16)

    return kind.dtype(types.float32, kind), generate


@intrinsic
def fma(context, x, y, z):
    """Return x y + z, rounded once."""

    def generate(context, b, signature, arguments):
        return b.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@njit
def exp(x):
    """Return e to the power of x with an error of about one unit in the last place.

    A polynomial becomes vector instructions in a loop, which a call of the C library does not.
    Source: the coefficients are those of `expf` in Cephes (Moshier 1984 to 2000).
    """
    given = x
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    shift = np.float32(12582912.0)  # 1.5 · 2^23: adding it rounds to an integer
    n = fma(x, np.float32(1.44269504), shift) - shift
    r = fma(n, np.float32(-0.693359375), x)
    r = fma(n, np.float32(2.12194440e-4), r)
    p = np.float32(1.9875691500e-4)
    p = fma(p, r, np.float32(1.3981999507e-3))
    p = fma(p, r, np.float32(8.3334519073e-3))
    p = fma(p, r, np.float32(4.1665795894e-2))
    p = fma(p, r, np.float32(1.6666665459e-1))
    p = fma(p, r, np.float32(5.0000001201e-1))
    p = fma(p, r * r, r + np.float32(1.0))
    result = p * _from_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    return result if given == given else given  # NaN stays NaN


@njit
def expm1(x):
    """Return e to the power of x, less 1, with all digits of what is near 0."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    shift = np.float32(12582912.0)
    n = fma(x, np.float32(1.44269504), shift) - shift
    r = fma(n, np.float32(-0.693359375), x)
    r = fma(n, np.float32(2.12194440e-4), r)
    p = np.float32(1.9875691500e-4)
    p = fma(p, r, np.float32(1.3981999507e-3))
    p = fma(p, r, np.float32(8.3334519073e-3))
    p = fma(p, r, np.float32(4.1665795894e-2))
    p = fma(p, r, np.float32(1.6666665459e-1))
    p = fma(p, r, np.float32(5.0000001201e-1))
    p = fma(p, r * r, r)
    power = _from_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    return fma(power, p, power - np.float32(1.0))


@njit
def share(total, thread, threads):
    """Return the first and the last item but one of a thread's share."""
    return total * thread // threads, total * (thread + 1) // threads


KINDS = {"float32": np.float32, "bfloat16": np.uint16}
"""What names a number format for a kernel."""
