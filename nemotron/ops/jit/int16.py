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
from nemotron.ops.jit.strips import ROW, _call
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
