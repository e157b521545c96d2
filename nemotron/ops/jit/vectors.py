"""Vector arithmetic as LLVM instructions: sixteen float32 numbers at a time.

Compilers choose the order of a sum by the sizes around it. Here the order is written down: a
product adds up its inputs one by one, for any number of rows, and a sum over lanes has one tree. So
a row's bits do not depend on the rows beside it, on the number of threads, or on vector registers.
Weights and caches are float32, or bfloat16 as the upper half of one (`uint16`).
"""

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from nemotron.ops.jit.scalars import item_size

LANES = 16
BLOCK = 64
"""Outputs that are computed together: four vectors of weights for each input."""

MANY_ROWS = 4
PART_BYTES = 3 << 13
"""Memory of the weights that so many rows, or more, read again and again: most of a first cache."""

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_I1 = ir.IntType(1)
_VECTOR = ir.VectorType(_F32, LANES)
_PARTS = BLOCK // LANES
_SUMS = 24 if binding.get_host_cpu_features().get("avx512f") else 6
"""Vectors of sums that stay in registers, beside weights and inputs: there are 32 registers of 16
numbers, or 16 of 8."""


def _is_bf16(kind):
    return kind.dtype == types.uint16


def _at(b, address, offset):
    return b.add(address, _I64(offset)) if isinstance(offset, int) else b.add(address, offset)


def _pointer(b, address, type_):
    return b.inttoptr(address, type_.as_pointer())


def _load(b, address, *, bf16=False, lanes=LANES):
    """Return numbers in memory as float32: a vector, or one where `lanes` is 1."""
    if not bf16:
        return b.load(_pointer(b, address, _VECTOR if lanes > 1 else _F32), align=4)
    bits, wide, places = _I16, _I32, _I32(16)
    if lanes > 1:
        bits, wide = ir.VectorType(_I16, lanes), ir.VectorType(_I32, lanes)
        places = ir.Constant(wide, [16] * lanes)
    bits = b.load(_pointer(b, address, bits), align=2)
    return b.bitcast(b.shl(b.zext(bits, wide), places), _VECTOR if lanes > 1 else _F32)


def _store(b, value, address):
    b.store(value, _pointer(b, address, value.type), align=4)


def _splat(b, value):
    none = ir.Constant(_VECTOR, ir.Undefined)
    first = b.insert_element(none, value, _I32(0))
    return b.shuffle_vector(first, none, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _fma(b, x, y, z):
    """Return x y + z, rounded once; llvmlite's own takes no vectors."""
    if x.type == _F32:
        return b.fma(x, y, z)
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v16f32"), [x, y, z])


def _fetch(b, address):
    """Fetch memory that a later pass reads, so that whole rows come one after the other."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(fetch, [b.inttoptr(address, pointer), _I32(0), _I32(3), _I32(1)])


def _zero():
    return ir.Constant(_VECTOR, [0.0] * LANES)


def _sum_lanes(b, vector):
    """Add the upper half to the lower one until one number is left."""
    width = LANES
    while width > 1:
        width //= 2
        none = ir.Constant(vector.type, ir.Undefined)
        places = ir.VectorType(_I32, width)
        low = b.shuffle_vector(vector, none, ir.Constant(places, list(range(width))))
        high = b.shuffle_vector(vector, none, ir.Constant(places, list(range(width, 2 * width))))
        vector = b.fadd(low, high)
    return b.extract_element(vector, _I32(0))


def _make_tile(rows):
    """Return an intrinsic that multiplies some rows by a block of weights [count, 64].

    Of the outputs, as many are computed together as sums stay in registers.
    """
    parts = max(parts for parts in (1, 2, _PARTS) if parts * rows <= _SUMS)

    @intrinsic
    def tile(context, xs, ys, start, offset, weight, count, fresh, kind):
        signature = types.void(*[types.int64] * 6, types.boolean, kind)
        bf16 = _is_bf16(kind)
        size = 2 if bf16 else 4

        def fill(b, arguments):
            xs, ys, start, offset, weight, count, fresh = arguments
            sources, targets = (
                [b.load(_pointer(b, _at(b, table, 8 * row), _I64)) for row in range(rows)]
                for table in (xs, ys)
            )
            sources = [_at(b, source, start) for source in sources]
            targets = [_at(b, target, offset) for target in targets]
            sums = [[cgutils.alloca_once(b, _VECTOR) for _ in range(parts)] for _ in range(rows)]
            for first in range(0, _PARTS, parts):
                places = [
                    [_at(b, target, 4 * LANES * (first + part)) for part in range(parts)]
                    for target in targets
                ]
                for row in range(rows):
                    for place, total in zip(places[row], sums[row], strict=True):
                        b.store(b.select(fresh, _zero(), _load(b, place)), total)
                with cgutils.for_range(b, count, intp=_I64) as loop:
                    begin = _at(b, weight, b.mul(loop.index, _I64(BLOCK * size)))
                    if first == 0:
                        for line in range(LANES * size * parts, BLOCK * size, 64):
                            _fetch(b, _at(b, begin, line))
                    begin = _at(b, begin, LANES * size * first)
                    weights = [
                        _load(b, _at(b, begin, LANES * size * part), bf16=bf16)
                        for part in range(parts)
                    ]
                    for source, totals in zip(sources, sums, strict=True):
                        place = _at(b, source, b.mul(loop.index, _I64(4)))
                        x = _splat(b, b.load(_pointer(b, place, _F32)))
                        for w, total in zip(weights, totals, strict=True):
                            b.store(_fma(b, x, w, b.load(total)), total)
                for row in range(rows):
                    for place, total in zip(places[row], sums[row], strict=True):
                        _store(b, b.load(total), place)
            b.ret_void()

        def generate(context, b, signature, arguments):
            name = f"nemotron_tile_{rows}_{size}"
            b.call(_function(b.module, name, [_I64] * 6 + [_I1], fill), arguments[:-1])
            return context.get_dummy_value()

        return signature, generate

    return tile


def _function(module, name, types_, fill, result=None):
    """Return a function of a module that is compiled once and called, not copied into callers."""
    function = module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(result or ir.VoidType(), types_)
        function = ir.Function(module, kind, name)
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        fill(ir.IRBuilder(function.append_basic_block()), function.args)
    return function


_tile_1, _tile_2, _tile_4, _tile_6 = map(_make_tile, (1, 2, 4, 6))


@njit
def tile(xs, ys, rows, offset, weight, count, fresh, kind):
    """y (+)= x W for one block of outputs, `offset` bytes from the beginning of each row of y.

    `xs` and `ys` are addresses of the rows' addresses. With `fresh`, y begins with 0. For many rows
    the inputs are taken in parts, whose weights stay in the first cache; no sum changes its order.
    """
    depth = count
    if rows >= MANY_ROWS:
        depth = PART_BYTES // (BLOCK * item_size(kind))
    start = 0
    while start < count:
        part, is_fresh = min(depth, count - start), fresh and start == 0
        begin, row = weight + start * BLOCK * item_size(kind), 0
        while row + 6 <= rows and row + 8 != rows:  # eight are two fours
            x, y = xs + 8 * row, ys + 8 * row
            _tile_6(x, y, start * 4, offset, begin, part, is_fresh, kind)
            row += 6
        while row + 4 <= rows:
            x, y = xs + 8 * row, ys + 8 * row
            _tile_4(x, y, start * 4, offset, begin, part, is_fresh, kind)
            row += 4
        if row + 2 <= rows:
            x, y = xs + 8 * row, ys + 8 * row
            _tile_2(x, y, start * 4, offset, begin, part, is_fresh, kind)
            row += 2
        if row < rows:
            x, y = xs + 8 * row, ys + 8 * row
            _tile_1(x, y, start * 4, offset, begin, part, is_fresh, kind)
        start += part


def _for_each(b, count, body):
    """Call body(first, lanes) for whole vectors, then for the numbers that are left over."""
    whole = b.mul(b.sdiv(count, _I64(LANES)), _I64(LANES))
    for begin, end, lanes in ((_I64(0), whole, LANES), (whole, count, 1)):
        with cgutils.for_range_slice(b, begin, end, _I64(lanes), _I64) as (first, _):
            body(first, lanes)


class _Sum:
    """A sum over lanes, and that of what fills no vector."""

    def __init__(self, b):
        self._b = b
        self._parts = {
            LANES: cgutils.alloca_once_value(b, _zero()),
            1: cgutils.alloca_once_value(b, _F32(0.0)),
        }

    def add(self, x, y, lanes):
        place = self._parts[lanes]
        self._b.store(_fma(self._b, x, y, self._b.load(place)), place)

    def total(self):
        b = self._b
        return b.fadd(_sum_lanes(b, b.load(self._parts[LANES])), b.load(self._parts[1]))


@intrinsic
def dot(context, x, y, count, kind):
    """Return the sum of x y; x is float32."""
    bf16 = _is_bf16(kind)

    def generate(context, b, signature, arguments):
        x, y, count, _ = arguments
        result = _Sum(b)

        def body(first, lanes):
            left = _load(b, _at(b, x, b.mul(first, _I64(4))), lanes=lanes)
            place = _at(b, y, b.mul(first, _I64(2 if bf16 else 4)))
            result.add(left, _load(b, place, bf16=bf16, lanes=lanes), lanes)

        _for_each(b, count, body)
        return result.total()

    return types.float32(types.int64, types.int64, types.int64, kind), generate


@intrinsic
def add_scaled(context, y, x, factor, count, kind):
    """y += factor x; y is float32."""
    bf16 = _is_bf16(kind)

    def generate(context, b, signature, arguments):
        y, x, factor, count, _ = arguments
        scales = {LANES: _splat(b, factor), 1: factor}

        def body(first, lanes):
            target = _at(b, y, b.mul(first, _I64(4)))
            place = _at(b, x, b.mul(first, _I64(2 if bf16 else 4)))
            new = _load(b, place, bf16=bf16, lanes=lanes)
            _store(b, _fma(b, scales[lanes], new, _load(b, target, lanes=lanes)), target)

        _for_each(b, count, body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64, kind), generate


@intrinsic
def advance(context, state, B, C, decay, factor, count):
    """S <- decay S + factor B, in place; return S · C. All are float32."""

    def generate(context, b, signature, arguments):
        state, left, right, decay, factor, count = arguments
        decays = {LANES: _splat(b, decay), 1: decay}
        factors = {LANES: _splat(b, factor), 1: factor}
        result = _Sum(b)

        def body(first, lanes):
            offset = b.mul(first, _I64(4))
            place = _at(b, state, offset)
            scaled = b.fmul(decays[lanes], _load(b, place, lanes=lanes))
            added = _load(b, _at(b, left, offset), lanes=lanes)
            new = _fma(b, factors[lanes], added, scaled)
            _store(b, new, place)
            result.add(new, _load(b, _at(b, right, offset), lanes=lanes), lanes)

        _for_each(b, count, body)
        return result.total()

    integer, real = types.int64, types.float32
    return types.float32(integer, integer, integer, real, real, integer), generate
