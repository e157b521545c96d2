"""Softmax over the rows of a strip, a bit at a time: each of sixteen columns is a query of its own.

Scores are logarithms to base 2. A row is a key; the first one has number `first`, and a column sees
the keys from `lows` to `highs`, int32. Counts of rows are multiples of 4.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nemotron.ops.jit.strips import ROW, _call
from nemotron.ops.jit.vectors import (
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

LOWEST = -1e30
"""What a score is that a query does not see, and its highest one before it has seen any."""
_BITS = ir.VectorType(_I32, LANES)
_TOGETHER = 4
_POLYNOMIAL = (
    *(1.5353361892e-04, 1.3398874422e-03, 9.6184373578e-03, 5.5503324711e-02, 2.4022647914e-01),
    *(6.9314720286e-01, 1.0),
)
"""Of 2^x for |x| <= 1/2, by least greatest relative error (2e-9) among those that are 1 at 0."""


def _all(value):
    return ir.Constant(_VECTOR, [value] * LANES)


def _exp2(b, x):
    """Return 2^x for x <= 0, or a little above, with an error of about a unit in the last place."""
    lowest, shift = _all(-125.0), _all(12582912.0)  # 1.5 · 2^23: adding it rounds to an integer
    x = b.select(b.fcmp_ordered("<", x, lowest), lowest, x)  # NaN stays NaN
    shifted = b.fadd(x, shift)
    rest = b.fsub(x, b.fsub(shifted, shift))
    power = _all(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        power = _fma(b, power, rest, _all(coefficient))
    exponent = b.shl(b.bitcast(shifted, _BITS), ir.Constant(_BITS, [23] * LANES))
    return b.bitcast(b.add(b.bitcast(power, _BITS), exponent), _VECTOR)


def _greater(b, x, y):
    return b.select(b.fcmp_ordered("<", x, y), y, x)


def _sum(b, rows):
    while len(rows) > 1:
        rows = [b.fadd(x, y) for x, y in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]


class _Seen:
    """Which keys of a strip each column sees; without a mask all."""

    def __init__(self, b, masked, lows, highs, first):
        self._b, self._masked = b, masked
        if masked:
            load = [b.load(_pointer(b, place, _BITS), align=4) for place in (lows, highs)]
            self._lows, self._highs = load
            self._first = b.trunc(first, _I32)

    def choose(self, row, value, otherwise):
        if not self._masked:
            return value
        b = self._b
        key = _splat_integer(b, b.add(self._first, b.trunc(row, _I32)))
        seen = b.and_(
            b.icmp_signed("<=", self._lows, key), b.icmp_signed("<=", key, self._highs)
        )
        return b.select(seen, value, _all(otherwise))


def _splat_integer(b, value):
    none = ir.Constant(_BITS, ir.Undefined)
    first = b.insert_element(none, value, _I32(0))
    return b.shuffle_vector(first, none, ir.Constant(_BITS, [0] * LANES))


def _in_fours(b, rows, body):
    with cgutils.for_range_slice(b, _I64(0), rows, _I64(_TOGETHER), _I64) as (row, _):
        body([b.add(row, _I64(more)) for more in range(_TOGETHER)])


def _row(b, strip, row):
    return _at(b, strip, b.mul(row, _I64(ROW)))


def _make_advance(masked):
    @intrinsic
    def advance(context, scores, rows, top, total, sums, depth, lows, highs, first):
        """Replace scores by 2^(score - top) with the new `top`, and add them to `total`.

        `total` and the `depth` rows of `sums` are first scaled to the new top.
        """

        def fill(b, arguments):
            scores, rows, top, total, sums, depth, lows, highs, first = arguments
            seen = _Seen(b, masked, lows, highs, first)
            before = _load(b, top)
            highest = cgutils.alloca_once_value(b, before)

            def find(places):
                found = []
                for row in places:
                    place = _row(b, scores, row)
                    score = seen.choose(row, _load(b, place), LOWEST)
                    if masked:
                        _store(b, score, place)
                    found.append(score)
                left, right = (_greater(b, *found[i : i + 2]) for i in (0, 2))
                b.store(_greater(b, b.load(highest), _greater(b, left, right)), highest)

            _in_fours(b, rows, find)
            now = b.load(highest)
            _store(b, now, top)
            factor = _exp2(b, b.fsub(before, now))
            added = cgutils.alloca_once_value(b, _zero())

            def replace(places):
                found = []
                for row in places:
                    place = _row(b, scores, row)
                    power = _exp2(b, b.fsub(_load(b, place), now))
                    power = seen.choose(row, power, 0.0)
                    _store(b, power, place)
                    found.append(power)
                b.store(b.fadd(b.load(added), _sum(b, found)), added)

            _in_fours(b, rows, replace)
            _store(b, _fma(b, _load(b, total), factor, b.load(added)), total)
            with cgutils.for_range(b, depth, intp=_I64) as loop:
                place = _row(b, sums, loop.index)
                _store(b, b.fmul(_load(b, place), factor), place)
            b.ret_void()

        signature = types.void(*[types.int64] * 9)
        return signature, _call(f"nemotron_softmax_{int(masked)}", [_I64] * 9, fill)

    return advance


def _make_retreat(masked):
    @intrinsic
    def retreat(context, scores, slopes, rows, logs, inner, lows, highs, first):
        """Replace scores by p = 2^(score - log), and their slopes g by p (g - inner)."""

        def fill(b, arguments):
            scores, slopes, rows, logs, inner, lows, highs, first = arguments
            seen = _Seen(b, masked, lows, highs, first)
            log, mean = _load(b, logs), _load(b, inner)

            def replace(places):
                for row in places:
                    place, other = _row(b, scores, row), _row(b, slopes, row)
                    power = seen.choose(row, _exp2(b, b.fsub(_load(b, place), log)), 0.0)
                    _store(b, power, place)
                    _store(b, b.fmul(power, b.fsub(_load(b, other), mean)), other)

            _in_fours(b, rows, replace)
            b.ret_void()

        signature = types.void(*[types.int64] * 8)
        return signature, _call(f"nemotron_softmax_back_{int(masked)}", [_I64] * 8, fill)

    return retreat


advance, advance_masked = _make_advance(masked=False), _make_advance(masked=True)
retreat, retreat_masked = _make_retreat(masked=False), _make_retreat(masked=True)
