"""Element and scale formats: E2M1, E4M3, E5M2 and E8M0, rounded and saturated as the hardware does.

Values are float32; codes are raw bytes. Source of the rules: NVIDIA/TransformerEngine:
transformer_engine/common/util/ptx.cuh.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
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


def to_fp8(x: Float[Tensor, "*shape"], format: FP8) -> Tensor:
    """Round to nearest even, saturating at the largest value; NaN stays NaN."""
    # torch's own casts do not saturate alike in every version and format
    return x.float().clamp(-format.max, format.max).to(format.dtype)


def decode_fp8(elements: Tensor) -> Float[Tensor, "*shape"]:
    """Return FP8 elements in float32.

    On a CPU, where torch converts them one by one, they are read as float16 with their bits moved
    to its places.
    """
    if elements.device.type != "cpu":
        return elements.float()
    if elements.dtype == E5M2.dtype:
        return (elements.view(torch.uint8).to(torch.int16) << 8).view(torch.float16).float()
    signed = elements.view(torch.int8)
    # E4M3 has its NaN, 0x7F and 0xFF, where the next number would be
    if elements.numel() and (signed.amax() == 0x7F or signed.view(torch.uint8).amax() == 0xFF):
        return elements.float()
    halves = (signed.to(torch.int16) << 7).bitwise_and_(~0x4000).view(torch.float16)
    return halves.float().mul_(2.0**8)


def round_e2m1(y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round to the nearest E2M1 value, ties to even, saturating at 6; NaN becomes 6."""
    limited = y.float().nan_to_num(nan=E2M1_MAX).clamp_(-E2M1_MAX, E2M1_MAX)
    step = _step(limited)
    return limited.div_(step).round_().mul_(step)


def round_e2m1_stochastically(
    y: Float[Tensor, "*shape"], bits: UInt8[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Round to one of the two neighbors, up with the probability of the distance from below.

    `bits` holds 8 random bits for each element. A representable value is kept; the probability
    is rounded down to a multiple of 1/256. NaN becomes 6.
    """
    y = y.float()
    magnitude = y.abs().nan_to_num_(nan=E2M1_MAX).clamp_(max=E2M1_MAX)
    # the product is exact, so this is the one rounding that the fused instruction has
    raised = magnitude.addcmul_(bits.float(), _step(magnitude), value=2.0**-RANDOM_BITS)
    step = _step(raised)
    return raised.div_(step).floor_().mul_(step).clamp_(max=E2M1_MAX).copysign_(y)


def encode_e2m1(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Return the code of each E2M1 value: 0 to 7, and 8 more for a negative one, zero included."""
    # times 2^-14 they are float16 numbers whose bits 9 to 11 and 15 are those of the code
    bits = (values * 2.0**-14).half().view(torch.int16)
    return (bits >> 9).bitwise_and_(7).bitwise_or_((bits >> 12).bitwise_and_(8)).to(torch.uint8)


def decode_e2m1(codes: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the value of each code."""
    bits = codes.to(torch.int16)
    halves = ((bits & 7) << 9).bitwise_or_((bits & 8) << 12).view(torch.float16)
    return halves.float().mul_(2.0**14)


def pack_e2m1(codes: UInt8[Tensor, "*rows K"]) -> UInt8[Tensor, "*rows half"]:
    """Put two codes into a byte, the first in the low half; an odd one out is followed by 0."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pairs = codes.contiguous().view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_e2m1(packed: UInt8[Tensor, "*rows half"]) -> UInt8[Tensor, "*rows K"]:
    """Return the two codes of each byte in order."""
    bits = packed.to(torch.int16)
    return (bits & 15).bitwise_or_((bits & 0xF0) << 4).view(torch.uint8)


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
    exponents = bytes_.to(torch.int32) << 23
    # the byte 0 is a subnormal number of float32
    return exponents.clamp_(min=1 << 22).view(torch.float32).masked_fill_(bytes_ == 255, torch.nan)


def _step(y: Tensor) -> Tensor:
    """Return the distance of neighbors at each magnitude: 0.5 below 2, 1 below 4, then 2.

    That is half of the power of two in the magnitude, but at least 0.5.
    """
    power = y.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    return power.clamp_(min=1).mul_(0.5)
