"""The weighted squared ReLU of sixteen numbers at a time, and its gradients."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nemotron.ops.jit.strips import _narrow, _widen
from nemotron.ops.jit.vectors import (
    _F32,
    LANES,
    _fma,
    _is_bf16,
    _load,
    _pointer,
    _splat,
    _store,
    _zero,
)


def _positive(b, x):
    """Return what is above 0; NaN stays NaN."""
    return b.select(b.fcmp_unordered("ugt", x, _zero()), x, _zero())


@intrinsic
def activate_lanes(context, place, kept, weight, kind):
    """Replace x by relu(x)² w, both rounded to a format; x is kept in it."""
    bf16 = _is_bf16(kind)

    def generate(context, b, signature, arguments):
        place, kept, weight, _ = arguments
        x = _load(b, place)
        narrow = _narrow(b, x) if bf16 else x
        b.store(narrow, _pointer(b, kept, narrow.type), align=2 if bf16 else 4)
        positive = _positive(b, _widen(b, narrow) if bf16 else x)
        y = b.fmul(b.fmul(positive, positive), _splat(b, weight))
        _store(b, _widen(b, _narrow(b, y)) if bf16 else y, place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, kind), generate


@intrinsic
def activate_back(context, kept, slope, activated, sums, weight, kind):
    """Replace dy by 2 relu(x) w dy, write relu(x)² w, and add relu(x)² dy to `sums`."""
    bf16 = _is_bf16(kind)

    def generate(context, b, signature, arguments):
        kept, slope, activated, sums, weight, _ = arguments
        positive, dy = _positive(b, _load(b, kept, bf16=bf16)), _load(b, slope)
        square, scale = b.fmul(positive, positive), _splat(b, weight)
        _store(b, _fma(b, square, dy, _load(b, sums)), sums)
        y = b.fmul(square, scale)
        _store(b, _widen(b, _narrow(b, y)) if bf16 else y, activated)
        twice = b.fmul(scale, ir.Constant(ir.VectorType(_F32, LANES), [2.0] * LANES))
        _store(b, b.fmul(b.fmul(positive, dy), twice), slope)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32, kind), generate
