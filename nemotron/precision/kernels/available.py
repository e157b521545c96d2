"""Which kernels a tensor has; those of Triton are only imported where it is installed."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

from torch import Tensor


def of_blocks(x: Tensor) -> ModuleType | None:
    """Return the kernels that quantize a tensor in MXFP8, or None where it has none."""
    return _of_blocks() if x.device.type == "cuda" else None


def of_nvfp4(x: Tensor) -> ModuleType | None:
    """Return the kernels that quantize a tensor in NVFP4: none, whatever the tensor.

    Their scales were wrong with Triton 3.6 on compute capability 9.0. The cause is known and
    avoided (`quantize_fp8.has_kernels`), but they have not run on a GPU since; once
    tests/precision/test_block_kernels.py passes on one, this is `of_blocks`.
    """
    return None


@cache
def _of_blocks() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("nemotron.precision.kernels.quantize_blocks")
