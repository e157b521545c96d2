"""FP8 with delayed scaling: a tensor's scale comes from the largest magnitudes of earlier steps.

Source: NVIDIA/TransformerEngine: transformer_engine/common/recipe/delayed_scaling.cu.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.precision import fp8
from nemotron.precision.config import DelayedConfig
from nemotron.precision.formats import FLT_MAX
from nemotron.precision.groups import Groups, Sizes
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import PER_TENSOR, Matrix, Reduce, Scheme

FRESH = {"amax_history": 0.0, "scale": 1.0}
"""What the state of a tensor holds before the first step."""


class Histories:
    """Scales of all tensors with delayed scaling, and the magnitudes that they come from.

    `sizes` gives each matrix's name and the number of its experts, or 1. All lie in two tensors,
    which are the state of a run.
    """

    def __init__(
        self, sizes: Mapping[str, int], options: DelayedConfig, device: torch.device
    ) -> None:
        self._options = options
        self._slices: dict[str, slice] = {}
        largest, end = [], 0
        for name, size in sizes.items():
            for operand, format in PER_TENSOR.items():
                self._slices[f"{name}.{operand}"] = slice(end, end := end + size)
                largest += [format.max * 2.0**-options.margin] * size
        self._largest = torch.tensor(largest, dtype=torch.float32, device=device)
        shape = (end, options.history_length)
        self._amax = torch.full(shape, FRESH["amax_history"], device=device)
        """Column 0 collects the step that runs; the others go from the oldest to the newest."""
        self._scale = torch.full((end,), FRESH["scale"], device=device)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the state by name: [experts, steps] magnitudes and [experts] scales."""
        for name, where in self._slices.items():
            yield f"{name}.amax_history", self._amax[where]
            yield f"{name}.scale", self._scale[where]

    def slots(self, name: str, first: int = 0, count: int = 1) -> dict[str, "Slot"]:
        """Return the operands' slots of some experts of a matrix, or of its only tensor."""
        slots = {}
        for operand in PER_TENSOR:
            start = self._slices[f"{name}.{operand}"].start + first
            own = slice(start, start + count)
            slots[operand] = Slot(self._amax[own, 0], self._scale[own])
        return slots

    def roll(self, reduce: Reduce) -> None:
        """End a step: put its magnitudes into the histories and set the scales of the next.

        `reduce` makes the largest of all ranks out of this rank's magnitudes. A tensor that was
        not seen keeps history and scale; one with an infinity in its history keeps its scale.
        """
        if not self._slices:
            return
        newest = reduce(self._amax[:, 0].clone())
        history = torch.cat([self._amax[:, 1:], newest.unsqueeze(1)], 1)
        amax = history.amax(1) if self._options.algorithm == "max" else newest
        scale = torch.div(self._largest, amax).clamp(max=FLT_MAX)
        is_seen, is_usable = newest != 0, (amax > 0) & amax.isfinite()
        self._scale.copy_(torch.where(is_seen & is_usable, scale, self._scale))
        history[:, 0] = 0
        self._amax.copy_(torch.where(is_seen.unsqueeze(1), history, self._amax))


@dataclass(frozen=True)
class Slot:
    """The magnitudes and scales of one operand: views of the histories' tensors."""

    newest: Float[Tensor, " G"]
    scale: Float[Tensor, " G"]


@dataclass(frozen=True)
class DelayedFP8Scheme(Scheme):
    """One scale for a tensor, known before the tensor is; gradients in E5M2.

    Source: transformer_engine/common/recipe/__init__.py, DelayedScaling.
    """

    slots: Mapping[str, Slot]

    def for_experts(self, experts: slice) -> "DelayedFP8Scheme":
        """Return the scheme of some of the experts, which lie in the same slots."""
        slots = {
            operand: Slot(slot.newest[experts], slot.scale[experts])
            for operand, slot in self.slots.items()
        }
        return replace(self, slots=slots)

    def remember(
        self, operand: str, tensor: Float[Tensor, "M K"], sizes: Sizes | None = None
    ) -> None:
        """Let a step's magnitudes grow; a NaN leaves no trace, as in the kernel's fmaxf."""
        groups = Groups((tensor.shape[0],) if sizes is None else sizes)
        found = groups.amax(tensor.detach())
        newest = self.slots[operand].newest
        torch.maximum(newest, found.nan_to_num(nan=0.0, posinf=torch.inf), out=newest)

    def _matrices(
        self, operand: str, padded: Tensor, groups: Groups, draw: Draw | None, *, both: bool
    ) -> tuple[Matrix, Matrix | None]:
        # the scale changes in place at the end of the step, before which backward may not be done
        scale = self.slots[operand].scale.clone()
        found = fp8.quantize_scaled(padded, PER_TENSOR[operand], scale, groups)
        return found, found
