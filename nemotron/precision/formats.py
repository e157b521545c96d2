"""Element and scale formats: E2M1, E4M3, E5M2 and E8M0, rounded and saturated as the hardware does.

Values are float32; codes are raw bytes. Source of the rules: NVIDIA/TransformerEngine:
transformer_engine/common/util/ptx.cuh.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLT_MAX = torch.finfo(torch.float32).max
RANDOM_BITS = 8
"""Bits that decide how an element is rounded stochastically."""


@dataclass(frozen=True)
class FP8:
    """An eight-bit floating-point format."""

    name: str
    dtype: torch.dtype
    max: float


E4M3 = FP8("e4m3", torch.float8_e4m3fn, 448.0)
E5M2 = FP8("e5m2", torch.float8_e5m2, 57344.0)


def divide(numerator: float, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return numerator / x with one rounding; torch's `number / tensor` rounds twice."""
    return torch.div(torch.full_like(x, numerator), x)


def power_of_two(exponents: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 2^exponent in float32, subnormals included."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents).float()


def to_fp8(x: Float[Tensor, "*shape"], format: FP8) -> Tensor:
    """Round to nearest even, saturating at the largest value; NaN stays NaN."""
    # torch's own casts do not saturate alike in every version and format
    return x.float().clamp(-format.max, format.max).to(format.dtype)


def round_e2m1(y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round to the nearest E2M1 value, ties to even, saturating at 6; NaN becomes 6."""
    magnitude = _magnitude(y)
    step = _step(magnitude)
    return magnitude.div_(step).round_().mul_(step).copysign_(y)


def round_e2m1_stochastically(
    y: Float[Tensor, "*shape"], bits: UInt8[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Round to one of the two neighbours, up with the probability of the distance from below.

    `bits` holds 8 random bits for each element. A representable value is kept; the probability
    is rounded down to a multiple of 1/256.
    """
    magnitude = _magnitude(y)
    # the product is exact, so this is the one rounding that the fused instruction has
    raised = bits.float().mul_(1 / 256).mul_(_step(magnitude)).add_(magnitude)
    step = _step(raised)
    return raised.div_(step).floor_().mul_(step).clamp_(max=E2M1_MAX).copysign_(y)


def encode_e2m1(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Return the code of each E2M1 value: 0 to 7, and 8 more for a negative one, zero included."""
    table = torch.zeros(int(2 * E2M1_MAX) + 1, dtype=torch.uint8, device=values.device)
    doubled = torch.tensor(E2M1_VALUES, device=values.device).mul(2).long()
    table[doubled] = torch.arange(8, dtype=torch.uint8, device=values.device)
    codes = table.index_select(0, values.abs().mul_(2).int().flatten()).view(values.shape)
    return codes.bitwise_or_(values.signbit().to(torch.uint8).bitwise_left_shift_(3))


def decode_e2m1(codes: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the value of each code."""
    table = torch.tensor((*E2M1_VALUES, *(-v for v in E2M1_VALUES)), device=codes.device)
    return table.index_select(0, codes.int().flatten()).view(codes.shape)


def pack_e2m1(codes: UInt8[Tensor, "*rows K"]) -> UInt8[Tensor, "*rows half"]:
    """Put two codes into a byte, the first in the low half; an odd one out is followed by 0."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: UInt8[Tensor, "*rows half"]) -> UInt8[Tensor, "*rows K"]:
    """Return the two codes of each byte in order."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def ceil_to_e8m0(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Return the byte of the smallest power of two that is at least `x`, which is not negative.

    0 has the byte 0, infinity 254, NaN 255.
    """
    bits = x.float().contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # a subnormal has the exponent 0: up to 2^-127 it is the byte 0, above it the byte 1
    up = torch.where(exponent == 0, mantissa > 1 << 22, mantissa > 0)
    byte = (exponent + up).clamp(max=254)
    return torch.where(x.isnan(), 255, byte).to(torch.uint8)


def decode_e8m0(bytes_: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 2^(byte - 127), and NaN for 255."""
    return power_of_two(bytes_.long() - 127).masked_fill(bytes_ == 255, torch.nan)


def _magnitude(y: Tensor) -> Tensor:
    """Return a new tensor of magnitudes up to 6; fmin takes the number beside a NaN."""
    largest = torch.tensor(E2M1_MAX, device=y.device)
    return torch.fmin(y.float().abs(), largest)


def _step(magnitude: Tensor) -> Tensor:
    """Return the distance of neighbours at each magnitude: 0.5 below 2, 1 below 4, then 2.

    That is half of the power of two in the magnitude, but at least 0.5.
    """
    power = magnitude.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    return power.clamp_(min=1).mul_(0.5)
