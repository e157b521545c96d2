"""Sixteen sums at a time, each in the order in which `vectors` takes one alone.

A sum over lanes costs more than the few products before it. Sixteen of them share their additions:
two vectors are folded into the halves of one, two of these into quarters, until every lane is one
of the sums. What sixteen lanes do not fill is left to the functions for one.
"""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from nemotron.ops.jit.vectors import (
    _F32,
    _I32,
    _I64,
    _VECTOR,
    LANES,
    _at,
    _fma,
    _for_each,
    _function,
    _is_bf16,
    _load,
    _pointer,
    _splat,
    _store,
    _sum_lanes,
    _zero,
)


def _fold(b, vectors):
    """Return the sum over the lanes of each of sixteen vectors; the tree is that of one."""
    width = LANES // 2
    while len(vectors) > 1:
        lower = [lane for lane in range(2 * LANES) if lane // width % 2 == 0]
        masks = [
            ir.Constant(ir.VectorType(_I32, LANES), [lane + shift for lane in lower])
            for shift in (0, width)
        ]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.fadd(*(b.shuffle_vector(x, y, mask) for mask in masks)) for x, y in pairs]
        width //= 2
    return vectors[0]


def _sums(b):
    return [cgutils.alloca_once_value(b, _zero()) for _ in range(LANES)]


@intrinsic
def score_16(context, q, keys, step, size, scale, target, kind):
    """Write scale (q · k) for sixteen keys, `step` bytes from each other.

    `size` is that of whole vectors.
    """
    bf16 = _is_bf16(kind)

    def fill(b, arguments):
        q, keys, step, size, scale, target = arguments
        sums = _sums(b)
        with cgutils.for_range_slice(b, _I64(0), size, _I64(LANES), _I64) as (first, _):
            left = _load(b, _at(b, q, b.mul(first, _I64(4))))
            begin = _at(b, keys, b.mul(first, _I64(2 if bf16 else 4)))
            for number, place in enumerate(sums):
                key = _at(b, begin, b.mul(step, _I64(number)))
                b.store(_fma(b, left, _load(b, key, bf16=bf16), b.load(place)), place)
        found = _fold(b, [b.load(place) for place in sums])
        _store(b, b.fmul(found, _splat(b, scale)), target)
        b.ret_void()

    def generate(context, b, signature, arguments):
        name = f"nemotron_score_16_{bf16}"
        function = _function(b.module, name, [_I64] * 4 + [_F32, _I64], fill)
        b.call(function, arguments[:-1])
        return context.get_dummy_value()

    integer, real = types.int64, types.float32
    return types.void(integer, integer, integer, integer, real, integer, kind), generate


@intrinsic
def advance_16(context, state, B, C, decay, dt, skip, x, target, count):
    """S <- decay S + dt x B for sixteen rows of a state; write S · C + skip x.

    `count` is the size of a row, of whole vectors.
    """

    def fill(b, arguments):
        state, left, right, decay, dt, skip, x, target, count = arguments
        inputs, decays = _load(b, x), _splat(b, decay)
        factors = cgutils.alloca_once_value(b, b.fmul(_splat(b, dt), inputs))
        factors = b.ptrtoint(factors, _I64)
        sums, step = _sums(b), b.mul(count, _I64(4))
        with cgutils.for_range_slice(b, _I64(0), count, _I64(LANES), _I64) as (first, _):
            offset = b.mul(first, _I64(4))
            added, read = _load(b, _at(b, left, offset)), _load(b, _at(b, right, offset))
            for number, sum_ in enumerate(sums):
                place = _at(b, _at(b, state, offset), b.mul(step, _I64(number)))
                factor = _splat(b, b.load(_pointer(b, _at(b, factors, 4 * number), _F32)))
                new = _fma(b, factor, added, b.fmul(decays, _load(b, place)))
                _store(b, new, place)
                b.store(_fma(b, new, read, b.load(sum_)), sum_)
        found = _fold(b, [b.load(place) for place in sums])
        _store(b, _fma(b, _splat(b, skip), inputs, found), target)
        b.ret_void()

    def generate(context, b, signature, arguments):
        kinds = [_I64] * 3 + [_F32] * 3 + [_I64] * 3
        b.call(_function(b.module, "nemotron_advance_16", kinds, fill), arguments)
        return context.get_dummy_value()

    integer, real = types.int64, types.float32
    kinds = (*[integer] * 3, *[real] * 3, *[integer] * 3)
    return types.void(*kinds), generate


@intrinsic
def add_up(context, x, count):
    """Return the sum of float32 numbers."""

    def generate(context, b, signature, arguments):
        x, count = arguments
        sums = {
            LANES: cgutils.alloca_once_value(b, _zero()),
            1: cgutils.alloca_once_value(b, _F32(0.0)),
        }

        def body(first, lanes):
            new = _load(b, _at(b, x, b.mul(first, _I64(4))), lanes=lanes)
            b.store(b.fadd(b.load(sums[lanes]), new), sums[lanes])

        _for_each(b, count, body)
        return b.fadd(_sum_lanes(b, b.load(sums[LANES])), b.load(sums[1]))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def largest(context, x, count):
    """Return the largest of float32 numbers; those that are not a number do not count."""

    def generate(context, b, signature, arguments):
        x, count = arguments
        least = float("-inf")
        found = {
            LANES: cgutils.alloca_once_value(b, ir.Constant(_VECTOR, [least] * LANES)),
            1: cgutils.alloca_once_value(b, _F32(least)),
        }

        def larger(one, other):
            return b.select(b.fcmp_ordered(">", one, other), one, other)

        def body(first, lanes):
            new = _load(b, _at(b, x, b.mul(first, _I64(4))), lanes=lanes)
            b.store(larger(new, b.load(found[lanes])), found[lanes])

        _for_each(b, count, body)
        result, lanes = b.load(found[1]), b.load(found[LANES])
        for lane in range(LANES):
            result = larger(b.extract_element(lanes, _I32(lane)), result)
        return result

    return types.float32(types.int64, types.int64), generate


def _make_weigh(rows, parts):
    """Return an intrinsic that adds up values for some rows, in some vectors of each."""

    @intrinsic
    def weigh(context, weights, weight_step, values, value_step, count, ys, y_step, kind):
        bf16 = _is_bf16(kind)

        def fill(b, arguments):
            weights, weight_step, values, value_step, count, ys, y_step = arguments
            targets = [
                _at(b, _at(b, ys, b.mul(y_step, _I64(row))), 4 * LANES * part)
                for row in range(rows)
                for part in range(parts)
            ]
            sums = [cgutils.alloca_once_value(b, _load(b, target)) for target in targets]
            with cgutils.for_range(b, count, intp=_I64) as loop:
                value = _at(b, values, b.mul(value_step, loop.index))
                size = LANES * (2 if bf16 else 4)
                found = [_load(b, _at(b, value, size * k), bf16=bf16) for k in range(parts)]
                for row in range(rows):
                    place = _at(b, weights, b.mul(weight_step, _I64(row)))
                    place = _at(b, place, b.mul(loop.index, _I64(4)))
                    weight = _splat(b, b.load(_pointer(b, place, _F32)))
                    for part, new in enumerate(found):
                        sum_ = sums[row * parts + part]
                        b.store(_fma(b, weight, new, b.load(sum_)), sum_)
            for target, sum_ in zip(targets, sums, strict=True):
                _store(b, b.load(sum_), target)
            b.ret_void()

        def generate(context, b, signature, arguments):
            name = f"nemotron_weigh_{rows}_{parts}_{bf16}"
            b.call(_function(b.module, name, [_I64] * 7, fill), arguments[:-1])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, kind), generate

    return weigh


_weigh_4_2, _weigh_4_1 = _make_weigh(4, 2), _make_weigh(4, 1)
_weigh_1_2, _weigh_1_1 = _make_weigh(1, 2), _make_weigh(1, 1)


@njit
def weigh(weights, weight_step, rows, values, value_step, count, ys, y_step, size, item, kind):
    """y += weights · values for some rows; `size` numbers of `item` bytes make a value.

    `size` is that of whole vectors. Rows are added up alike, four at a time or alone.
    """
    done = 0
    while done < size:
        parts = 2 if done + 32 <= size else 1
        v, row = values + done * item, 0
        while row < rows:
            w, y = weights + row * weight_step, ys + row * y_step + done * 4
            if row + 4 <= rows:
                if parts == 2:
                    _weigh_4_2(w, weight_step, v, value_step, count, y, y_step, kind)
                else:
                    _weigh_4_1(w, weight_step, v, value_step, count, y, y_step, kind)
                row += 4
            else:
                if parts == 2:
                    _weigh_1_2(w, weight_step, v, value_step, count, y, y_step, kind)
                else:
                    _weigh_1_1(w, weight_step, v, value_step, count, y, y_step, kind)
                row += 1
        done += 16 * parts
