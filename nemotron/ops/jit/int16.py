"""Products of matrices in 16-bit integers with a power of two for each block of an inner dimension.

A block is up to `BLOCK` numbers along the dimension that a product adds up: integers of 12 bits and
a sign, times one power of two, so that its largest is between 2048 and 4096 of them. A bfloat16
number that is at least a sixteenth of the largest stays as it is; smaller ones keep the place of
the last bit. Products of two integers are added up exactly in 32 bits, two at a time by one
instruction (`vpmaddwd`), which does twice the work of one that adds float32 products. A block with
a NaN or an infinity has NaN as its factor.

In memory a block is its factors, float32, and then its integers: [columns / 16, rows, 16] beside a
factor for each row, where a row is added up; [rows / 2, 16, 2] for a strip of 16 columns beside a
factor for each, where columns are. Counts of rows are multiples of 8.

Source: Das et al. 2018, "Mixed Precision Training of Convolutional Neural Networks using Integer
Operations", whose tensors have one power of two each.
"""

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nemotron.ops.jit.lanes import _narrow
from nemotron.ops.jit.strips import ROW, _call, swap
from nemotron.ops.jit.vectors import (
    _F32,
    _I1,
    _I16,
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

BLOCK = 64
"""Numbers of an inner dimension that have a factor together; 4096² times as many fit 32 bits."""
HALF_ROW = ROW // 2
"""Bytes from a row of integers to the next."""
_FEATURES = binding.get_host_cpu_features()
_ROWS, _WIDTH = (8, 16) if _FEATURES.get("avx512bw") else (4, 8)
"""Rows of a result whose sums stay in registers, and pairs of integers in a register."""
_MULTIPLY = "llvm.x86.avx512.pmaddw.d.512" if _WIDTH == 16 else "llvm.x86.avx2.pmadd.wd"
_HAS_MULTIPLY = _WIDTH == 16 or _FEATURES.get("avx2", False)
_REGISTER, _PARTS = ir.VectorType(_I32, _WIDTH), LANES // _WIDTH
_BITS = ir.VectorType(_I32, LANES)
_SHORTS = ir.VectorType(_I16, LANES)


def _all(value):
    return ir.Constant(_BITS, [value] * LANES)


def _splat_bits(b, value):
    none = ir.Constant(_BITS, ir.Undefined)
    return b.shuffle_vector(b.insert_element(none, value, _I32(0)), none, _all(0))


def _part(b, vector, first, count):
    places = ir.Constant(ir.VectorType(_I32, count), list(range(first, first + count)))
    return b.shuffle_vector(vector, vector, places)


def _multiply_pairs(b, x, y):
    """Return x₀ y₀ + x₁ y₁ for pairs of 16-bit integers, each pair in 32 bits."""
    if _HAS_MULTIPLY:
        shorts = ir.VectorType(_I16, 2 * _WIDTH)
        kind = ir.FunctionType(_REGISTER, [shorts] * 2)
        function = cgutils.get_or_insert_function(b.module, kind, _MULTIPLY)
        return b.call(function, [b.bitcast(z, shorts) for z in (x, y)])
    half = ir.Constant(_REGISTER, [16] * _WIDTH)
    upper = b.mul(b.ashr(x, half), b.ashr(y, half))
    return b.add(upper, b.mul(*(b.ashr(b.shl(z, half), half) for z in (x, y))))


def _hold(b, sum_):
    """Keep a sum where it is: a compiler that orders the additions anew runs out of registers."""
    if not _HAS_MULTIPLY:
        return sum_
    kind, place = ir.FunctionType(_REGISTER, [_REGISTER]), "=v,0" if _WIDTH == 16 else "=x,0"
    return b.asm(kind, "", place, [sum_], side_effect=False)


def _begin(b, sums):
    for place in sums:
        b.store(ir.Constant(_REGISTER, [0] * _WIDTH), place)


def _add_products(b, left, between, right, sums):
    """Add to rows of sums a pair each, `between` bytes from the last one, times a row of pairs."""
    weights = [
        b.load(_pointer(b, _at(b, right, 4 * first), _REGISTER), align=4)
        for first in range(0, LANES, _WIDTH)
    ]
    for row in range(_ROWS):
        x = b.load(_pointer(b, _at(b, left, row * between), _I32), align=4)
        x = _part(b, _splat_bits(b, x), 0, _WIDTH)
        for place, y in zip(sums[row * _PARTS :], weights, strict=False):
            b.store(_hold(b, b.add(b.load(place), _multiply_pairs(b, x, y))), place)


def _finish(b, sums, factors, by, target, fresh):
    """Return rows of a strip with sums, each times its row's factor and those of the columns."""
    whole = ir.Constant(ir.VectorType(_I32, LANES), list(range(LANES)))
    for row in range(_ROWS):
        factor = b.load(_pointer(b, _at(b, factors, 4 * row), _F32), align=4)
        factor = b.fmul(_splat(b, factor), by)
        before = b.select(fresh, _zero(), _load(b, _at(b, target, ROW * row)))
        parts = [b.load(place) for place in sums[row * _PARTS : (row + 1) * _PARTS]]
        sum_ = b.shuffle_vector(parts[0], parts[-1], whole)
        yield _fma(b, b.sitofp(sum_, _VECTOR), factor, before)


def _multiply(b, a, rows, count, strips, column, c, fresh, write):
    """Call write(row, vectors) for some rows of C + A B after the others, the first being `row`."""
    sums = [cgutils.alloca_once(b, _REGISTER) for _ in range(_ROWS * _PARTS)]
    numbers, weights = _at(b, a, b.mul(rows, _I64(4))), _at(b, column, ROW)
    step, by = b.mul(rows, _I64(HALF_ROW)), _load(b, column)
    with cgutils.for_range_slice(b, _I64(0), count, _I64(_ROWS), _I64) as (row, _):
        _begin(b, sums)
        source = _at(b, numbers, b.mul(row, _I64(HALF_ROW)))
        with cgutils.for_range(b, strips, intp=_I64) as loop:
            left = _at(b, source, b.mul(loop.index, step))
            right = _at(b, weights, b.mul(loop.index, _I64(LANES // 2 * ROW)))
            for pair in range(LANES // 2):
                line = _at(b, right, pair * ROW)
                _add_products(b, _at(b, left, 4 * pair), HALF_ROW, line, sums)
        factors, target = _at(b, a, b.mul(row, _I64(4))), _at(b, c, b.mul(row, _I64(ROW)))
        write(row, _finish(b, sums, factors, by, target, fresh))
    b.ret_void()


@intrinsic
def multiply(context, a, rows, count, strips, b, c, fresh):
    """C (+)= A B for one strip of C [count, 16], which begins with 0 where `fresh`.

    A is the first rows of a block of `rows` rows of so many strips of integers, B a block of 16
    columns, with as many pairs of rows as A has pairs of columns.
    """
    signature = types.void(*[types.int64] * 6, types.boolean)

    def fill(build, arguments):
        a, rows, count, strips, b, c, fresh = arguments

        def write(row, vectors):
            for k, vector in enumerate(vectors):
                _store(build, vector, _at(build, c, build.mul(build.add(row, _I64(k)), _I64(ROW))))

        _multiply(build, a, rows, count, strips, b, c, fresh, write)

    return signature, _call("nemotron_multiply_int16", [_I64] * 6 + [_I1], fill)


@intrinsic
def multiply_to(context, a, rows, strips, b, c, fresh, y, between):
    """Write C + A B, or A B where `fresh`, as bfloat16 rows, which are `between` bytes apart."""
    signature = types.void(*[types.int64] * 5, types.boolean, *[types.int64] * 2)

    def fill(build, arguments):
        a, rows, strips, b, c, fresh, y, between = arguments

        def write(row, vectors):
            for k, vector in enumerate(vectors):
                place = _at(build, y, build.mul(build.add(row, _I64(k)), between))
                build.store(_narrow(build, vector), _pointer(build, place, _SHORTS), align=2)

        _multiply(build, a, rows, rows, strips, b, c, fresh, write)

    kinds = [_I64] * 5 + [_I1] + [_I64] * 2
    return signature, _call("nemotron_multiply_int16_to", kinds, fill)


@intrinsic
def multiply_transposed(context, a, b, pairs, c, fresh):
    """C (+)= Aᵀ B for one strip of C [16, 16], which begins with 0 where `fresh`.

    A and B are blocks of 16 columns with so many pairs of rows.
    """
    signature = types.void(*[types.int64] * 4, types.boolean)
    together = 4

    def fill(build, arguments):
        a, b, pairs, c, fresh = arguments
        sums = [cgutils.alloca_once(build, _REGISTER) for _ in range(_ROWS * _PARTS)]
        by = _load(build, b)
        with cgutils.for_range(build, _I64(LANES // _ROWS), intp=_I64) as group:
            _begin(build, sums)
            offset = build.mul(group.index, _I64(4 * _ROWS))
            factors = _at(build, a, offset)
            source = _at(build, factors, ROW)
            with cgutils.for_range_slice(build, _I64(0), pairs, _I64(together), _I64) as (pair, _):
                offset = build.mul(pair, _I64(ROW))
                left, right = _at(build, source, offset), _at(build, _at(build, b, ROW), offset)
                for more in range(together):
                    line = _at(build, right, more * ROW)
                    _add_products(build, _at(build, left, more * ROW), 4, line, sums)
            target = _at(build, c, build.mul(group.index, _I64(ROW * _ROWS)))
            for row, vector in enumerate(_finish(build, sums, factors, by, target, fresh)):
                _store(build, vector, _at(build, target, row * ROW))
        build.ret_void()

    return signature, _call("nemotron_multiply_transposed_int16", [_I64] * 4 + [_I1], fill)


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
