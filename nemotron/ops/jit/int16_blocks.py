"""Numbers written as blocks of 16-bit integers, as `int16` multiplies them.

A block's power of two is that of its largest number, so that this one is between 2048 and 4096 of
the integers. Where what is multiplied has factors of its own, numbers are first multiplied by them.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nemotron.ops.jit.int16 import _BITS, _SHORTS, BLOCK, HALF_ROW, _all, _part
from nemotron.ops.jit.strips import ROW, _call, swap
from nemotron.ops.jit.vectors import (
    _F32,
    _I32,
    _I64,
    _VECTOR,
    LANES,
    _at,
    _fma,
    _load,
    _pointer,
    _splat,
    _store,
    _zero,
)


def _greater(b, x, y):
    return b.select(b.icmp_signed(">", x, y), x, y)


def _magnitude(b, highest, numbers):
    """Return the greater one of numbers without their signs, as bits; of a NaN, that is NaN."""
    return _greater(b, b.and_(b.bitcast(numbers, _BITS), _all(0x7FFFFFFF)), highest)


def _factors(b, highest):
    """Return the factors of integers whose largest numbers are `highest`, in bits, and the inverse.

    The largest becomes at most 4096, also when that is what it is rounded to.
    """
    count = highest.type.count
    numbers = ir.VectorType(_F32, count)

    def same(value):
        return ir.Constant(highest.type, [value] * count)

    highest = b.add(highest, same(1 << 11))
    exponent = b.and_(highest, same(0x7F800000))
    lowest = same(30 << 23)  # so that the inverse is finite
    exponent = b.select(b.icmp_signed(">", exponent, lowest), exponent, lowest)
    factor = b.sub(exponent, same(11 << 23))
    inverse = b.sub(same((254 + 11) << 23), exponent)
    is_finite = b.icmp_signed("<", exponent, same(0x7F800000))
    factor = b.select(is_finite, factor, same(0x7FC00000))
    return b.bitcast(factor, numbers), b.bitcast(inverse, numbers)


def _integers(b, numbers, inverse):
    """Return numbers, rounded to nearest even, as the lower 16 of 32 bits."""
    shift = ir.Constant(_VECTOR, [12582912.0] * LANES)  # 1.5 · 2^23: adding it rounds
    return b.bitcast(_fma(b, numbers, inverse, shift), _BITS)


def _pair(b, first, second):
    """Return integers in the lower and others in the upper 16 of 32 bits."""
    return b.or_(b.and_(first, _all(0xFFFF)), b.shl(second, _all(16)))


_EVEN, _ODD = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
_LOW, _HIGH = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]


def _highest_of_rows(b, rows):
    """Return the highest number of each of eight vectors, as a vector of eight."""
    rows = [_greater(b, _part(b, row, 0, 8), _part(b, row, 8, 8)) for row in rows]
    for halves in (_EVEN, _ODD), (_EVEN, _ODD), (_LOW, _HIGH):
        places = [ir.Constant(ir.VectorType(_I32, 8), half) for half in halves]
        rows = [
            _greater(b, *(b.shuffle_vector(x, y, place) for place in places))
            for x, y in zip(rows[::2], rows[1::2], strict=True)
        ]
    return rows[0]


def _times(b, numbers, factors):
    """Return products, in which 0 times what is not finite is 0."""
    is_zero = b.fcmp_ordered("==", numbers, _zero())
    return b.select(is_zero, numbers, b.fmul(numbers, factors))


def _quantize_rows(b, source, step, rows, strips, target, factors=None):
    """Write eight rows at a time; whole blocks without a loop over their strips."""
    is_whole = b.icmp_signed("==", strips, _I64(BLOCK // LANES))
    with b.if_else(is_whole) as (whole, some):
        with whole:
            strips_of_block = [_I64(strip) for strip in range(BLOCK // LANES)]
            _quantize_eights(b, source, step, rows, strips_of_block, target, factors)
        with some:
            _quantize_eights(b, source, step, rows, strips, target, factors)
    b.ret_void()


def _for_each(b, strips, body):
    if isinstance(strips, list):
        for strip in strips:
            body(strip)
    else:
        with cgutils.for_range(b, strips, intp=_I64) as loop:
            body(loop.index)


def _quantize_eights(b, source, step, rows, strips, target, factors):
    def read(begin, strip):
        x = _load(b, _at(b, begin, b.mul(strip, step)))
        if factors is None:
            return x
        return _times(b, x, _load(b, _at(b, factors, b.mul(strip, _I64(ROW)))))

    highest = cgutils.alloca_once(b, _BITS)
    numbers = _at(b, target, b.mul(rows, _I64(4)))
    wide = b.mul(rows, _I64(HALF_ROW))

    def find(begin):
        def raise_highest(strip):
            b.store(_magnitude(b, b.load(highest), read(begin, strip)), highest)

        b.store(_all(0), highest)
        _for_each(b, strips, raise_highest)
        return b.load(highest)

    def write(begin, inverse, end):
        def write_strip(strip):
            shorts = b.trunc(_integers(b, read(begin, strip), inverse), _SHORTS)
            _store(b, shorts, _at(b, end, b.mul(strip, wide)))

        _for_each(b, strips, write_strip)

    with cgutils.for_range_slice(b, _I64(0), rows, _I64(8), _I64) as (first, _):
        begin, end = (
            _at(b, place, b.mul(first, _I64(size)))
            for place, size in ((source, ROW), (numbers, HALF_ROW))
        )
        found = [find(_at(b, begin, row * ROW)) for row in range(8)]
        factors_of_rows, inverses = _factors(b, _highest_of_rows(b, found))
        _store(b, factors_of_rows, _at(b, target, b.mul(first, _I64(4))))
        for row in range(8):
            inverse = _splat(b, b.extract_element(inverses, _I32(row)))
            write(_at(b, begin, row * ROW), inverse, _at(b, end, row * HALF_ROW))


@intrinsic
def quantize_rows(context, source, step, rows, strips, target):
    """Write rows of so many strips of float32 numbers, `step` bytes apart, as a block of rows."""

    def fill(b, arguments):
        _quantize_rows(b, *arguments)

    signature = types.void(*[types.int64] * 5)
    return signature, _call("nemotron_quantize_rows", [_I64] * 5, fill)


@intrinsic
def quantize_rows_times(context, source, step, rows, strips, factors, target):
    """Write the same of numbers times a factor of their column; 0 stays 0."""

    def fill(b, arguments):
        source, step, rows, strips, factors, target = arguments
        _quantize_rows(b, source, step, rows, strips, target, factors)

    signature = types.void(*[types.int64] * 6)
    return signature, _call("nemotron_quantize_rows_times", [_I64] * 6, fill)


def _quantize_columns(b, source, pairs, target, factors=None):
    def read(pair):
        begin = _at(b, source, b.mul(pair, _I64(2 * ROW)))
        for row in range(2):
            x = _load(b, _at(b, begin, row * ROW))
            if factors is None:
                yield x
            else:
                place = _at(b, _at(b, factors, b.mul(pair, _I64(8))), 4 * row)
                factor = b.load(_pointer(b, place, _F32), align=4)
                yield _times(b, x, _splat(b, factor))

    highest = cgutils.alloca_once_value(b, _all(0))
    with cgutils.for_range(b, pairs, intp=_I64) as pair:
        for x in read(pair.index):
            b.store(_magnitude(b, b.load(highest), x), highest)
    factor, inverse = _factors(b, b.load(highest))
    _store(b, factor, target)
    with cgutils.for_range(b, pairs, intp=_I64) as pair:
        both = _pair(b, *(_integers(b, x, inverse) for x in read(pair.index)))
        place = _at(b, _at(b, target, ROW), b.mul(pair.index, _I64(ROW)))
        b.store(both, _pointer(b, place, _BITS), align=4)
    b.ret_void()


@intrinsic
def quantize_columns(context, source, pairs, target):
    """Write so many pairs of rows of a strip of float32 numbers as a block of columns."""

    def fill(b, arguments):
        _quantize_columns(b, *arguments)

    signature = types.void(*[types.int64] * 3)
    return signature, _call("nemotron_quantize_columns", [_I64] * 3, fill)


@intrinsic
def quantize_columns_times(context, source, pairs, factors, target):
    """Write the same of numbers times a factor of their row; 0 stays 0."""

    def fill(b, arguments):
        source, pairs, factors, target = arguments
        _quantize_columns(b, source, pairs, target, factors)

    signature = types.void(*[types.int64] * 4)
    return signature, _call("nemotron_quantize_columns_times", [_I64] * 4, fill)


@intrinsic
def pair_rows(context, source, pairs, target):
    """Write pairs of rows of a strip of integers as a block of columns whose factors are 1."""

    def fill(b, arguments):
        source, pairs, target = arguments
        _store(b, ir.Constant(_VECTOR, [1.0] * LANES), target)
        with cgutils.for_range(b, pairs, intp=_I64) as pair:
            begin = _at(b, source, b.mul(pair.index, _I64(2 * HALF_ROW)))
            first, second = (
                b.load(_pointer(b, _at(b, begin, row * HALF_ROW), _SHORTS), align=2)
                for row in range(2)
            )
            both = _pair(b, b.zext(first, _BITS), b.zext(second, _BITS))
            place = _at(b, _at(b, target, ROW), b.mul(pair.index, _I64(ROW)))
            b.store(both, _pointer(b, place, _BITS), align=4)
        b.ret_void()

    signature = types.void(*[types.int64] * 3)
    return signature, _call("nemotron_pair_rows", [_I64] * 3, fill)


@intrinsic
def transpose(context, source, target):
    """Write 16 rows of a strip of integers as 8 pairs of rows of 16 columns."""
    half = ir.VectorType(_I32, 8)

    def fill(b, arguments):
        source, target = arguments
        for row in (0, 8):
            places = [_at(b, source, (row + i) * HALF_ROW) for i in range(8)]
            rows = [b.load(_pointer(b, place, half), align=4) for place in places]
            for distance in (4, 2, 1):
                swap(b, rows, distance)
            for i in range(8):
                _store(b, rows[i], _at(b, target, i * ROW + 4 * row))
        b.ret_void()

    signature = types.void(types.int64, types.int64)
    return signature, _call("nemotron_transpose_int16", [_I64] * 2, fill)
