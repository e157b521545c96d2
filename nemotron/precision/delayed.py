"""FP8 with delayed scaling: a tensor's scale comes from the largest magnitudes of earlier steps.

Source: NVIDIA/TransformerEngine: transformer_engine/common/recipe/delayed_scaling.cu.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.precision import fp8
from nemotron.precision.config import DelayedConfig
from nemotron.precision.formats import E4M3, E5M2, FLT_MAX, FP8
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import Quantized, Reduce, Scheme

FORMATS = {"x": E4M3, "w": E4M3, "dy": E5M2}
"""Elements of each operand (TE's HYBRID)."""


class Histories:
    """Scales of all tensors that are scaled late, and the magnitudes that they come from.

    `sizes` gives each matrix's name and the number of its experts, or 1. All lie in two tensors,
    which are the state of a run; before the first step magnitudes are 0 and scales 1.
    """

    def __init__(
        self, sizes: Mapping[str, int], options: DelayedConfig, device: torch.device
    ) -> None:
        self._options = options
        self._places: dict[str, slice] = {}
        largest, end = [], 0
        for name, size in sizes.items():
            for operand, format in FORMATS.items():
                self._places[f"{name}.{operand}"] = slice(end, end := end + size)
                largest += [format.max * 2.0**-options.margin] * size
        self._largest = torch.tensor(largest, dtype=torch.float32, device=device)
        self._amax = torch.zeros(end, options.history_length, device=device)
        """Place 0 collects the step that runs; the others go from the oldest to the newest."""
        self._scale = torch.ones(end, device=device)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the state by name: [experts, steps] magnitudes and [experts] scales."""
        for name, place in self._places.items():
            yield f"{name}.amax_history", self._amax[place]
            yield f"{name}.scale", self._scale[place]

    def slots(self, name: str) -> list[dict[str, "Slot"]]:
        """Return the operands' places of each expert of a matrix."""
        rows = {operand: self._places[f"{name}.{operand}"] for operand in FORMATS}
        size = rows["x"].stop - rows["x"].start
        return [
            {
                operand: Slot(
                    self._amax[place.start + expert, 0], self._scale[place.start + expert]
                )
                for operand, place in rows.items()
            }
            for expert in range(size)
        ]

    def roll(self, reduce: Reduce) -> None:
        """End a step: put its magnitudes into the histories and set the scales of the next.

        `reduce` makes the largest of all ranks out of this rank's magnitudes. A tensor that was
        not seen keeps history and scale; one with an infinity in its history keeps its scale.
        """
        if not self._places:
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
    """The places of one operand: views of the histories' tensors."""

    newest: Float[Tensor, ""]
    scale: Float[Tensor, ""]


@dataclass(frozen=True)
class DelayedFP8Scheme(Scheme):
    """One scale for a tensor, known before the tensor is; gradients in E5M2.

    Source: transformer_engine/common/recipe/__init__.py, DelayedScaling.
    """

    slots: Mapping[str, Slot]

    def remember(self, operand: str, tensor: Tensor) -> None:
        """Let a step's magnitude grow; a NaN leaves no trace, as in the kernel's fmaxf."""
        newest = self.slots[operand].newest
        found = tensor.detach().abs().amax().float().nan_to_num(nan=0.0, posinf=torch.inf)
        torch.maximum(newest, found, out=newest)

    def activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        return self._quantized("x", x)

    def kept_activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        return self._quantized("x", x).turn()

    def weight(self, w: Float[Tensor, "N K"]) -> tuple[Quantized, Quantized]:
        found = self._quantized("w", w)
        return found, found.turn()

    def gradient(self, dy: Float[Tensor, "M N"], draw: Draw | None) -> tuple[Quantized, Quantized]:
        found = self._quantized("dy", dy)
        return found, found.turn()

    def _quantized(self, operand: str, tensor: Tensor) -> Quantized:
        format: FP8 = FORMATS[operand]
        # the scale changes in place at the end of the step, before which backward may not be done
        return Quantized(fp8.quantize_scaled(tensor, format, self.slots[operand].scale.clone()))
