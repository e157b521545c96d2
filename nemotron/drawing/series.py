"""Values over an axis."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """The values of one key; NaN where a record says that it was not finite."""

    x: Numbers
    """Steps, or tokens."""
    y: Numbers

    @property
    def finite(self) -> "Series":
        """The values that are finite."""
        known = np.isfinite(self.y)
        return Series(self.x[known], self.y[known])
