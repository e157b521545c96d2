"""Powers of 2 and of e for vectors, with an error of about a unit in the last place."""

from llvmlite import ir

from nemotron.ops.jit.vectors import _I32, _VECTOR, LANES, _fma

_BITS = ir.VectorType(_I32, LANES)
_POLYNOMIAL = (
    *(1.3264727065e-03, 9.6715126489e-03, 5.5507337437e-02, 2.4022242085e-01, 6.9314697760e-01),
    1.0,
)
"""Of 2^x for |x| <= 1/2, by least greatest relative error (9e-8) among those that are 1 at 0."""
_SHIFT = 12582912.0
"""1.5 · 2^23: adding it rounds to an integer."""


def all_of(value):
    """Return a vector of one number."""
    return ir.Constant(_VECTOR, [value] * LANES)


def exp2(b, x):
    """Return 2^x for x <= 0, or a little above."""
    lowest = all_of(-125.0)
    x = b.select(b.fcmp_ordered("<", x, lowest), lowest, x)  # NaN stays NaN
    shifted = b.fadd(x, all_of(_SHIFT))
    return _power(b, shifted, b.fsub(x, b.fsub(shifted, all_of(_SHIFT))))


def exp(b, x):
    """Return e^x; what is beyond the range of float32 is that of -87 or of 88."""
    for sign, limit in ("<", all_of(-87.0)), (">", all_of(88.0)):
        x = b.select(b.fcmp_ordered(sign, x, limit), limit, x)  # NaN stays NaN
    shifted = _fma(b, x, all_of(_LOG2_E), all_of(_SHIFT))
    whole = b.fsub(shifted, all_of(_SHIFT))
    rest = _fma(b, x, all_of(_LOG2_E), b.fneg(whole))
    return _power(b, shifted, _fma(b, x, all_of(_LOG2_E_REST), rest))


_LOG2_E, _LOG2_E_REST = 1.44269502162933349609375, 1.92596298909109e-8
"""The logarithm of e to base 2: a float32 number, and what is left."""


def _power(b, shifted, rest):
    power = all_of(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        power = _fma(b, power, rest, all_of(coefficient))
    exponent = b.shl(b.bitcast(shifted, _BITS), ir.Constant(_BITS, [23] * LANES))
    return b.bitcast(b.add(b.bitcast(power, _BITS), exponent), _VECTOR)
