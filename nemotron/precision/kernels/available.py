"""Which kernels a tensor has; those of Triton are only imported where it is installed."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

from torch import Tensor


def of_blocks(x: Tensor) -> ModuleType | None:
    """Return the kernels that quantize a tensor in MXFP8 or NVFP4, or None where it has none."""
    return _of_blocks() if x.device.type == "cuda" else None


@cache
def _of_blocks() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("nemotron.precision.kernels.quantize_blocks")
