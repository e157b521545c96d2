"""What quantizing does to each operand: its range, what is lost at either end, the error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron.precision.schemes import Operand


@dataclass
class OperandStatistics:
    """Sums over everything that was observed of one operand of one layer."""

    amax: float = 0.0
    nonzero: int = 0
    underflowed: int = 0
    dead: int = 0
    saturated: int = 0
    error: float = 0.0
    norm: float = 0.0

    def add(self, tensor: Tensor, operand: Operand) -> None:
        """Compare tensors, one under another, with their quantized form."""
        exact = operand.groups.fill(tensor.detach()).float()
        values = operand.values
        if operand.scale is not None:
            values = values * operand.groups.spread(operand.scale, 1)
        magnitude = exact.abs()
        lost = (values == 0) & (exact != 0)
        at_end = operand.elements.float().abs() == operand.largest
        self.amax = max(self.amax, magnitude.max().item())
        self.nonzero += int((exact != 0).sum())
        self.underflowed += int(lost.sum())
        self.dead += int((lost & (operand.elements.float() != 0)).sum())
        self.saturated += int((at_end & (magnitude > values.abs())).sum())
        self.error += (values - exact).double().square().sum().item()
        self.norm += exact.double().square().sum().item()

    def values(self) -> dict[str, float]:
        """Return the figures; shares are of the numbers that are not zero.

        Of those that underflow, the dead are in blocks whose scale became zero.
        """
        return {
            "amax": self.amax,
            "underflow": self.underflowed / max(1, self.nonzero),
            "dead": self.dead / max(1, self.nonzero),
            "saturation": self.saturated / max(1, self.nonzero),
            "error": (self.error / self.norm) ** 0.5 if self.norm else 0.0,
        }


class Telemetry:
    """Tallies of the layers and operands that were observed since they were last taken."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, str], OperandStatistics] = {}

    @torch.no_grad()
    def observe(self, module: str, name: str, tensor: Tensor, operand: Operand) -> None:
        """Add an operand: `x`, `w` or `dy`; an empty one is passed over."""
        if tensor.numel():
            self._tallies.setdefault((module, name), OperandStatistics()).add(tensor, operand)

    def take(self) -> dict[str, float]:
        """Return the metrics `precision/LAYER/OPERAND/FIGURE` and forget what they came from."""
        tallies, self._tallies = self._tallies, {}
        return {
            f"precision/{module.removeprefix('backbone.')}/{name}/{figure}": value
            for (module, name), tally in tallies.items()
            for figure, value in tally.values().items()
        }
