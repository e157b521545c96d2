"""Magnitudes that a layer saw, counted, and the largest one that a scale should reach.

Source: modelopt/torch/quantization/calib/histogram.py of NVIDIA/Model-Optimizer, whose bins are
evenly spaced; these are a 64th of a power of two wide, so that none has to grow.
"""

from math import ceil

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.precision.fixed_scales import round_fp8
from nemotron.precision.formats import E4M3

SHIFT = 17
"""Bits of a float32 number below those that number its bin: exponent and six of the mantissa."""
BINS = 1 << 31 - SHIFT
PERCENTILE = 0.9999
"""Share of the magnitudes that the observer `percentile` leaves unclipped."""
OCTAVES = 4
"""How far below the largest magnitude the observer `mse` looks."""


class Histogram:
    """Counts of magnitudes."""

    def __init__(self) -> None:
        self.counts: Int[Tensor, " bins"] = torch.zeros(BINS, dtype=torch.int64)
        self.largest: Float[Tensor, ""] = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Count the magnitudes of a tensor."""
        magnitudes = x.detach().float().abs().flatten()
        if magnitudes.numel():
            bins = magnitudes.view(torch.int32) >> SHIFT
            self.counts += torch.bincount(bins, minlength=BINS).cpu()
            self.largest = torch.maximum(self.largest, magnitudes.amax().cpu())

    def percentile(self, share: float = PERCENTILE) -> Float[Tensor, ""]:
        """Return the end of the bin up to which this share of the magnitudes lies."""
        wanted = ceil(share * int(self.counts.sum()))
        place = int((self.counts.cumsum(0) < wanted).sum())
        return torch.minimum(_edge(place + 1), self.largest)

    def mse(self) -> Float[Tensor, ""]:
        """Return the largest magnitude whose FP8 scale rounds with the smallest squared error."""
        if not torch.isfinite(self.largest) or not self.largest:
            return self.largest
        places = self.counts.nonzero().flatten()
        middles, counts = (_edge(places) + _edge(places + 1)) / 2, self.counts[places].double()
        last = int(places[-1]) + 1
        first = max(1, last - OCTAVES * (1 << 23 - SHIFT))
        candidates = torch.minimum(_edge(torch.arange(first, last + 1)), self.largest)
        errors = [
            ((round_fp8(middles, amax / E4M3.max) - middles).double().square() * counts).sum()
            for amax in candidates
        ]
        # of equal ones the largest, which clips least
        return candidates[-1 - int(torch.stack(errors).flip(0).argmin())]


def _edge(place: int | Int[Tensor, " n"]) -> Float[Tensor, "*n"]:
    """Return the smallest number of a bin."""
    return (torch.as_tensor(place, dtype=torch.int32) << SHIFT).view(torch.float32)
