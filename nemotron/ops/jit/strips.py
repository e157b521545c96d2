"""Products of small float32 matrices that lie in strips of columns: [columns / 16, rows, 16].

A row of a strip is one vector, and all of a strip's rows lie one behind the other, so the distance
between them is part of each instruction. A few rows of a result stay in registers while its inputs
are added up one by one: a number's bits depend neither on the rows beside it nor on the machine's
vectors. Addresses are those of the first row; counts of rows are multiples of 8.
"""

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nemotron.ops.jit.vectors import (
    _F32,
    _I1,
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
    _zero,
)

ROW = 4 * LANES
"""Bytes from a row of a strip to the next."""
_ROWS = 8 if binding.get_host_cpu_features().get("avx512f") else 4
"""Rows of a result in registers: as many as 16 of 8 lanes hold, or 32 of them."""


def _product(b, a, weights, sums, between):
    """Add to the rows in `sums` a number each, `between` bytes from the one before, times a row."""
    for row, place in enumerate(sums):
        x = _splat(b, b.load(_pointer(b, _at(b, a, row * between), _F32), align=4))
        b.store(_fma(b, x, weights, b.load(place)), place)


def _begin(b, c, fresh, sums):
    for row, place in enumerate(sums):
        b.store(b.select(fresh, _zero(), _load(b, _at(b, c, ROW * row))), place)


def _end(b, c, sums):
    for row, place in enumerate(sums):
        _store(b, b.load(place), _at(b, c, ROW * row))


def _call(name, kinds, fill):
    def generate(context, b, signature, arguments):
        b.call(_function(b.module, name, kinds, fill), arguments)
        return context.get_dummy_value()

    return generate


@intrinsic
def multiply(context, a, step, strips, b, c, rows, fresh):
    """C (+)= A B for one strip of C, which begins with 0 where `fresh`.

    A is [rows, 16 strips], whose strips begin `step` bytes from each other; B is [16 strips, 16].
    """
    signature = types.void(*[types.int64] * 6, types.boolean)

    def fill(build, arguments):
        a, step, strips, b, c, rows, fresh = arguments
        sums = [cgutils.alloca_once(build, _VECTOR) for _ in range(_ROWS)]
        with cgutils.for_range_slice(build, _I64(0), rows, _I64(_ROWS), _I64) as (row, _):
            begin = build.mul(row, _I64(ROW))
            target, source = _at(build, c, begin), _at(build, a, begin)
            _begin(build, target, fresh, sums)
            with cgutils.for_range(build, strips, intp=_I64) as loop:
                left = _at(build, source, build.mul(loop.index, step))
                right = _at(build, b, build.mul(loop.index, _I64(LANES * ROW)))
                for k in range(LANES):
                    weights = _load(build, _at(build, right, k * ROW))
                    _product(build, _at(build, left, 4 * k), weights, sums, ROW)
            _end(build, target, sums)
        build.ret_void()

    return signature, _call("nemotron_multiply", [_I64] * 6 + [_I1], fill)


@intrinsic
def multiply_transposed(context, a, step, strips, b, depth, c, fresh):
    """C (+)= A^T B for one strip of C, which begins with 0 where `fresh`.

    A is [depth, 16 strips], whose strips begin `step` bytes from each other; B is [depth, 16].
    """
    signature = types.void(*[types.int64] * 6, types.boolean)
    together = 4

    def fill(build, arguments):
        a, step, strips, b, depth, c, fresh = arguments
        sums = [cgutils.alloca_once(build, _VECTOR) for _ in range(_ROWS)]
        groups = build.mul(strips, _I64(LANES // _ROWS))
        with cgutils.for_range(build, groups, intp=_I64) as group:
            strip = build.sdiv(group.index, _I64(LANES // _ROWS))
            first = build.srem(group.index, _I64(LANES // _ROWS))
            source = _at(build, a, build.mul(strip, step))
            source = _at(build, source, build.mul(first, _I64(4 * _ROWS)))
            target = _at(build, c, build.mul(group.index, _I64(ROW * _ROWS)))
            _begin(build, target, fresh, sums)
            with cgutils.for_range_slice(build, _I64(0), depth, _I64(together), _I64) as (k, _):
                offset = build.mul(k, _I64(ROW))
                left, right = _at(build, source, offset), _at(build, b, offset)
                for more in range(together):
                    weights = _load(build, _at(build, right, more * ROW))
                    _product(build, _at(build, left, more * ROW), weights, sums, 4)
            _end(build, target, sums)
        build.ret_void()

    return signature, _call("nemotron_multiply_transposed", [_I64] * 6 + [_I1], fill)


def swap(b, rows, distance):
    """Exchange the corners off the diagonal of blocks of twice the distance, in 8 rows of 8."""
    places = ir.VectorType(_I32, 8)
    for i in range(8):
        if i & distance == 0:
            x, y = rows[i], rows[i + distance]
            lower = [j if j & distance == 0 else 8 + j - distance for j in range(8)]
            upper = [j + distance if j & distance == 0 else 8 + j for j in range(8)]
            rows[i] = b.shuffle_vector(x, y, ir.Constant(places, lower))
            rows[i + distance] = b.shuffle_vector(x, y, ir.Constant(places, upper))


@intrinsic
def transpose(context, source, target):
    """Write the transpose of 16 rows of a strip as 16 rows of another."""
    half = ir.VectorType(_F32, 8)

    def fill(b, arguments):
        source, target = arguments
        for row in (0, 8):
            for column in (0, 8):
                places = [_at(b, source, (row + i) * ROW + 4 * column) for i in range(8)]
                rows = [b.load(_pointer(b, place, half), align=4) for place in places]
                for distance in (4, 2, 1):
                    swap(b, rows, distance)
                for i in range(8):
                    _store(b, rows[i], _at(b, target, (column + i) * ROW + 4 * row))
        b.ret_void()

    signature = types.void(types.int64, types.int64)
    return signature, _call("nemotron_transpose", [_I64] * 2, fill)


@intrinsic
def widen(context, source, target, factor, kind):
    """Write 16 numbers of a format, times a factor, as float32."""
    bf16 = _is_bf16(kind)

    def generate(context, b, signature, arguments):
        source, target, factor, _ = arguments
        _store(b, b.fmul(_splat(b, factor), _load(b, source, bf16=bf16)), target)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, kind), generate


@intrinsic
def scale_rows(context, target, factors, rows):
    """Multiply each of some rows by a vector."""

    def generate(context, b, signature, arguments):
        target, factors, rows = arguments
        by = _load(b, factors)
        with cgutils.for_range(b, rows, intp=_I64) as loop:
            place = _at(b, target, b.mul(loop.index, _I64(ROW)))
            _store(b, b.fmul(by, _load(b, place)), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate
