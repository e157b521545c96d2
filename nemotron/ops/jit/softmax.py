"""Softmax over the rows of a strip, a bit at a time: each of sixteen columns is a query of its own.

Scores are logarithms to base 2, and a row is a key. Counts of rows are multiples of 4. The last two
functions are for a softmax over the columns of many strips, each row of which is one of its own;
scores are then logarithms to base e.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nemotron.ops.jit.powers import all_of, exp2
from nemotron.ops.jit.strips import ROW, _call
from nemotron.ops.jit.vectors import (
    _F32,
    _I32,
    _I64,
    LANES,
    _at,
    _fma,
    _load,
    _pointer,
    _splat,
    _store,
    _zero,
)

LOWEST = -1e30
"""What a score is that a query does not see, and its highest one before it has seen any."""
_BITS = ir.VectorType(_I32, LANES)


def _greater(b, x, y):
    return b.select(b.fcmp_ordered("<", x, y), y, x)


def _splat_integer(b, value):
    none = ir.Constant(_BITS, ir.Undefined)
    first = b.insert_element(none, value, _I32(0))
    return b.shuffle_vector(first, none, ir.Constant(_BITS, [0] * LANES))


def _row(b, strip, row):
    return _at(b, strip, b.mul(row, _I64(ROW)))


@intrinsic
def hide(context, strip, begin, end, value, lows, highs, first):
    """Write a value where a column does not see the key of a row, for some of the rows.

    The key of row 0 is `first`; a column sees those from `lows` to `highs`, int32.
    """

    def fill(b, arguments):
        strip, begin, end, value, lows, highs, first = arguments
        low, high = (b.load(_pointer(b, place, _BITS), align=4) for place in (lows, highs))
        hidden = _splat(b, value)
        with cgutils.for_range_slice(b, begin, end, _I64(1), _I64) as (row, _):
            place = _row(b, strip, row)
            key = _splat_integer(b, b.trunc(b.add(first, row), _I32))
            seen = b.and_(b.icmp_signed("<=", low, key), b.icmp_signed("<=", key, high))
            _store(b, b.select(seen, _load(b, place), hidden), place)
        b.ret_void()

    signature = types.void(*[types.int64] * 3, types.float32, *[types.int64] * 3)
    return signature, _call("nemotron_hide", [_I64] * 3 + [_F32] + [_I64] * 3, fill)


@intrinsic
def advance(context, scores, rows, top, total, sums, depth):
    """Replace scores by 2^(score - top) with the new `top`, and add them to `total`.

    `total` and the `depth` rows of `sums` are first scaled to the new top.
    """

    def fill(b, arguments):
        scores, rows, top, total, sums, depth = arguments
        before = _load(b, top)
        highest = cgutils.alloca_once_value(b, before)

        with cgutils.for_range_slice(b, _I64(0), rows, _I64(4), _I64) as (row, _):
            found = [_load(b, _row(b, scores, b.add(row, _I64(more)))) for more in range(4)]
            left, right = (_greater(b, *found[i : i + 2]) for i in (0, 2))
            b.store(_greater(b, b.load(highest), _greater(b, left, right)), highest)
        now = b.load(highest)
        _store(b, now, top)
        added = cgutils.alloca_once_value(b, _zero())

        with cgutils.for_range(b, rows, intp=_I64) as loop:
            place = _row(b, scores, loop.index)
            power = exp2(b, b.fsub(_load(b, place), now))
            _store(b, power, place)
            b.store(b.fadd(b.load(added), power), added)
        factor = exp2(b, b.fsub(before, now))
        _store(b, _fma(b, _load(b, total), factor, b.load(added)), total)
        changed = b.bitcast(b.fcmp_unordered("!=", before, now), ir.IntType(LANES))
        any_of_them = b.icmp_unsigned("!=", changed, ir.IntType(LANES)(0))
        with b.if_then(any_of_them), cgutils.for_range(b, depth, intp=_I64) as loop:
            place = _row(b, sums, loop.index)
            _store(b, b.fmul(_load(b, place), factor), place)
        b.ret_void()

    signature = types.void(*[types.int64] * 6)
    return signature, _call("nemotron_softmax", [_I64] * 6, fill)


@intrinsic
def retreat(context, scores, slopes, rows, logs, inner):
    """Replace scores by p = 2^(score - log), and their slopes g by p (g - inner)."""

    def fill(b, arguments):
        scores, slopes, rows, logs, inner = arguments
        log, mean = _load(b, logs), _load(b, inner)

        with cgutils.for_range(b, rows, intp=_I64) as loop:
            place, other = _row(b, scores, loop.index), _row(b, slopes, loop.index)
            power = exp2(b, b.fsub(_load(b, place), log))
            _store(b, power, place)
            _store(b, b.fmul(power, b.fsub(_load(b, other), mean)), other)
        b.ret_void()

    signature = types.void(*[types.int64] * 5)
    return signature, _call("nemotron_softmax_back", [_I64] * 5, fill)


@intrinsic
def raise_tops(context, strip, tops, rows):
    """Replace the sixteen highest scores of each row before a strip by those with it."""

    def fill(b, arguments):
        strip, tops, rows = arguments
        with cgutils.for_range(b, rows, intp=_I64) as loop:
            place = _row(b, tops, loop.index)
            _store(b, _greater(b, _load(b, place), _load(b, _row(b, strip, loop.index))), place)
        b.ret_void()

    signature = types.void(*[types.int64] * 3)
    return signature, _call("nemotron_raise_tops", [_I64] * 3, fill)


@intrinsic
def exponentiate(context, strip, tops, sums, rows):
    """Replace scores by e^(score - top), and add them to sixteen sums of each row."""

    def fill(b, arguments):
        strip, tops, sums, rows = arguments
        with cgutils.for_range(b, rows, intp=_I64) as loop:
            place, added = _row(b, strip, loop.index), _row(b, sums, loop.index)
            below = b.fsub(_load(b, place), _load(b, _row(b, tops, loop.index)))
            power = exp2(b, b.fmul(below, all_of(1.4426950408889634)))
            _store(b, power, place)
            _store(b, b.fadd(_load(b, added), power), added)
        b.ret_void()

    signature = types.void(*[types.int64] * 4)
    return signature, _call("nemotron_exponentiate", [_I64] * 4, fill)
