"""What every Triton kernel here needs: the interpreter's limits, and sizes that fit a program.

A module of kernels imports triton at its top, so only a lazy backend may import it.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""

LOG2_E = 1.4426950408889634

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """Return the type of a product's operands for tensors of this dtype.

    The interpreter multiplies the bit patterns of bfloat16, so operands are float32 there.
    """
    return tl.float32 if INTERPRETED else _TYPES[dtype]


def power_of_2(size: int) -> int:
    """Return the smallest power of 2 that is not below `size`: a block that holds it."""
    return triton.next_power_of_2(size)
