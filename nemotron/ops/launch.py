"""What Triton kernels here need: quick launches, the interpreter's limits, sizes of programs.

A module of kernels imports triton at its top, so only a lazy backend may import it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""

MOST_KEYS = 4096
"""Sizes that are remembered one by one; of more, a launch looks at what they have in common."""

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
    return 1 << (size - 1).bit_length()


class Launcher:
    """Launches a kernel; what Triton compiled for arguments like these is not searched again.

    Triton takes several times as long to find it as to launch it, which is more than a small kernel
    runs. What it specialises a kernel for is the key here as well: constants, types, and whether
    pointers and numbers are multiples of 16. A change of the kernel's global variables, of Triton's
    knobs, or of `pre_run_hooks` is not seen after the first launch.
    Source: triton-lang/triton: python/triton/runtime/jit.py, JITFunction.run.
    """

    def __init__(self, kernel: Any) -> None:  # Any: a kernel is compiled or interpreted
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Any, ...],
        numbers: tuple[int, ...],
        constants: tuple[float, ...],
        **options: int,
    ) -> None:
        """Launch on the tensors' device, which is the current one.

        A kernel takes its tensors and descriptors first, then its integers, then all its constants;
        a tensor is the last of the first. `options` are Triton's, such as num_warps.
        """
        key, pointers = [tensors[-1].device, constants, *options.values()], 0
        for tensor in tensors:
            if type(tensor) is TensorDescriptor:  # its tensor is aligned
                key.append((tensor.base.dtype, *tensor.block_shape))
            else:
                key.append(tensor.dtype)
                pointers |= tensor.data_ptr()
        if pointers & 15:
            key.append(tuple(isinstance(t, Tensor) and t.data_ptr() & 15 for t in tensors))
        exact = (numbers, *key)
        if (compiled := self._compiled.get(exact)) is None:
            # sizes may differ from call to call, and be alike in what counts
            alike = (*map(_class_of, numbers), *key)
            if (compiled := self._compiled.get(alike)) is None:
                compiled = self.kernel[grid](*tensors, *numbers, *constants, **options)
                # what was not loaded was only compiled, or interpreted
                if getattr(compiled, "function", None) is not None:
                    self._compiled[alike] = compiled
                return
            if len(self._compiled) < MOST_KEYS:
                self._compiled[exact] = compiled
        compiled[grid](*tensors, *numbers, *constants)


def _class_of(number: int) -> int:
    """Return what Triton distinguishes of an integer: 1, multiples of 16, and more than 32 bits."""
    return 0 if number == 1 else number >> 31 << 2 | (2 if number & 15 else 1)
