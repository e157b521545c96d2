"""Memory of compiled steps: rows of numbers, and the addresses of the rows."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemotron.ops.token_step.stack import BLOCK


def rounded(size: int) -> int:
    """Return a size rounded up to whole blocks of outputs."""
    return -(-size // BLOCK) * BLOCK


@dataclass
class Rows:
    """A float32 matrix whose rows are found by their addresses."""

    numbers: Tensor
    addresses: np.ndarray

    @classmethod
    def of(cls, count: int, width: int) -> "Rows":
        """Return `count` rows of zeros."""
        numbers = torch.zeros(count, max(width, BLOCK))
        step = numbers.stride(0) * 4
        first = numbers.data_ptr()
        return cls(numbers, np.arange(first, first + count * step, step, dtype=np.int64)[:count])

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.numbers.shape[1]

    @property
    def address(self) -> int:
        """Where the first row begins."""
        return self.numbers.data_ptr()

    @property
    def table(self) -> int:
        """Where the addresses of the rows lie."""
        return int(self.addresses.ctypes.data)
