"""Functions of each number by itself, as vector instructions.

A compiler that is given a loop over `scalars.exp` leaves it as it is. Here whole vectors are
computed, and numbers that fill none alone, by the same instructions: the bits are those of a
scalar.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nemotron.ops.jit.vectors import (
    _F32,
    _I32,
    _I64,
    _at,
    _fma,
    _for_each,
    _function,
    _is_bf16,
    _load,
    _pointer,
    _splat,
    _store,
)


def _like(x, value):
    """Return a constant of the type of `x`."""
    return ir.Constant(x.type, value if x.type == _F32 else [value] * x.type.count)


def _bits_of(x):
    return _I32 if x.type == _F32 else ir.VectorType(_I32, x.type.count)


def _integers(x, value):
    kind = _bits_of(x)
    return ir.Constant(kind, value if kind == _I32 else [value] * kind.count)


def _exp(b, given):
    """Return e to a power, as `scalars.exp` does."""
    low, high = _like(given, -87.0), _like(given, 88.0)
    x = b.select(b.fcmp_ordered(">", given, low), given, low)
    x = b.select(b.fcmp_ordered("<", x, high), x, high)
    shift = _like(x, 12582912.0)
    n = b.fsub(_fma(b, x, _like(x, 1.44269502162933349609375), shift), shift)
    r = _fma(b, n, _like(x, -0.693359375), x)
    r = _fma(b, n, _like(x, 2.12194440e-4), r)
    p = _like(x, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        p = _fma(b, p, r, _like(x, coefficient))
    p = _fma(b, p, b.fmul(r, r), b.fadd(r, _like(x, 1.0)))
    power = b.shl(b.add(b.fptosi(n, _bits_of(x)), _integers(x, 127)), _integers(x, 23))
    result = b.fmul(p, b.bitcast(power, x.type))
    return b.select(b.fcmp_ordered("==", given, given), result, given)


def _sigmoid(b, x):
    one = _like(x, 1.0)
    return b.fdiv(one, b.fadd(one, _exp(b, b.fsub(_like(x, -0.0), x))))


def _each(name, compute):
    """Return an intrinsic f(x, count): x <- compute(x), for float32 numbers."""

    def fill(b, arguments):
        x, count = arguments

        def body(first, lanes):
            place = _at(b, x, b.mul(first, _I64(4)))
            _store(b, compute(b, _load(b, place, lanes=lanes)), place)

        _for_each(b, count, body)
        b.ret_void()

    @intrinsic
    def function(context, x, count):
        def generate(context, b, signature, arguments):
            b.call(_function(b.module, name, [_I64] * 2, fill), arguments)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return function


apply_sigmoid = _each("nemotron_sigmoid", _sigmoid)
"""x <- 1 / (1 + e^-x)."""
apply_silu = _each("nemotron_silu", lambda b, x: b.fmul(x, _sigmoid(b, x)))
"""x <- x / (1 + e^-x)."""


@intrinsic
def apply_exp(context, x, shift, count):
    """x <- e^(x - shift)."""

    def fill(b, arguments):
        x, shift, count = arguments

        def body(first, lanes):
            place = _at(b, x, b.mul(first, _I64(4)))
            old, less = _load(b, place, lanes=lanes), shift if lanes == 1 else _splat(b, shift)
            _store(b, _exp(b, b.fsub(old, less)), place)

        _for_each(b, count, body)
        b.ret_void()

    def generate(context, b, signature, arguments):
        b.call(_function(b.module, "nemotron_exp", [_I64, _F32, _I64], fill), arguments)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), generate


@intrinsic
def apply_gate(context, y, z, count):
    """y <- y silu(z)."""

    def fill(b, arguments):
        y, z, count = arguments

        def body(first, lanes):
            offset = b.mul(first, _I64(4))
            gate, place = _load(b, _at(b, z, offset), lanes=lanes), _at(b, y, offset)
            gate = b.fmul(gate, _sigmoid(b, gate))
            _store(b, b.fmul(_load(b, place, lanes=lanes), gate), place)

        _for_each(b, count, body)
        b.ret_void()

    def generate(context, b, signature, arguments):
        b.call(_function(b.module, "nemotron_gate", [_I64] * 3, fill), arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def add_products(context, y, x, weight, count, kind):
    """y += x weight, number by number; y and weight are float32."""
    bf16 = _is_bf16(kind)

    def fill(b, arguments):
        y, x, weight, count = arguments

        def body(first, lanes):
            offset = b.mul(first, _I64(4))
            new = _load(b, _at(b, x, b.mul(first, _I64(2 if bf16 else 4))), bf16=bf16, lanes=lanes)
            factor, place = _load(b, _at(b, weight, offset), lanes=lanes), _at(b, y, offset)
            _store(b, _fma(b, new, factor, _load(b, place, lanes=lanes)), place)

        _for_each(b, count, body)
        b.ret_void()

    def generate(context, b, signature, arguments):
        function = _function(b.module, f"nemotron_add_products_{bf16}", [_I64] * 4, fill)
        b.call(function, arguments[:-1])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, kind), generate


@intrinsic
def round_to(context, x, count, kind):
    """Round float32 numbers to a format, to nearest even, and leave them float32."""
    bf16 = _is_bf16(kind)

    def generate(context, b, signature, arguments):
        x, count, _ = arguments

        def body(first, lanes):
            place = _at(b, x, b.mul(first, _I64(4)))
            given = _load(b, place, lanes=lanes)
            bits = b.bitcast(given, _bits_of(given))
            odd = b.and_(b.lshr(bits, _integers(given, 16)), _integers(given, 1))
            rounded = b.add(bits, b.add(odd, _integers(given, 0x7FFF)))
            rounded = b.and_(rounded, _integers(given, 0xFFFF0000))
            is_nan = b.fcmp_unordered("uno", given, given)
            rounded = b.select(is_nan, _integers(given, 0x7FC00000), rounded)
            _store(b, b.bitcast(rounded, given.type), place)

        if bf16:
            _for_each(b, count, body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, kind), generate


@intrinsic
def copy_bytes(context, target, source, count):
    """Copy bytes that do not overlap."""

    def generate(context, b, signature, arguments):
        target, source, count = arguments
        cgutils.raw_memcpy(
            b,
            _pointer(b, target, ir.IntType(8)),
            _pointer(b, source, ir.IntType(8)),
            count,
            1,
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate
