"""Which operand of a linear layer's three products is quantised how, for each format.

fprop is X Wᵀ, dgrad is dY W, wgrad is dYᵀ X. Each contracts another dimension, so each operand is
needed along two: `row` along its last dimension, `turned` along its first.
Source: NVIDIA/TransformerEngine: transformer_engine/common/recipe/__init__.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.precision import fp8, hadamard, mxfp8, nvfp4
from nemotron.precision.formats import E2M1_MAX, E4M3, E5M2
from nemotron.precision.random_bits import Draw

Reduce = Callable[[Tensor], Tensor]
"""Makes the largest magnitude of a whole tensor out of that of the part that is held here."""


@dataclass(frozen=True)
class Operand:
    """A decoded side of a product: `values` along the contracted dimension, times `scale`."""

    values: Float[Tensor, "rows K"]
    elements: Tensor
    """[rows, K]: what the codes alone stand for."""
    largest: float
    """Largest magnitude that a code stands for."""
    scale: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class Quantized:
    """A side of a product in codes and scales, which may lie turned: [K, rows]."""

    matrix: nvfp4.NVFP4 | nvfp4.PackedNVFP4 | mxfp8.MXFP8 | fp8.ScaledFP8
    turned: bool = False

    def turn(self) -> "Quantized":
        """Return the same numbers as a side that contracts the other dimension."""
        return replace(self, turned=not self.turned)

    def operand(self) -> Operand:
        """Decode it; the global scale of NVFP4 is left to the product."""
        matrix = self.matrix.unpack() if isinstance(self.matrix, nvfp4.PackedNVFP4) else self.matrix
        if isinstance(matrix, nvfp4.NVFP4):
            found = Operand(matrix.unscaled(), matrix.elements, E2M1_MAX, matrix.scale)
        else:
            largest = torch.finfo(matrix.elements.dtype).max
            found = Operand(matrix.dequantize(), matrix.elements, largest)
        if self.turned:
            found = replace(found, values=found.values.T, elements=found.elements.T)
        return found


@dataclass(frozen=True)
class Scheme(ABC):
    """How one format treats the operands `x`, `w` and `dy` of a layer."""

    reduce: Mapping[str, Reduce] = field(default_factory=dict, kw_only=True)
    """For each operand of which this process holds a part, how to know the whole's magnitude."""

    @abstractmethod
    def activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        """Quantise X for fprop."""

    @abstractmethod
    def kept_activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        """Quantise Xᵀ for wgrad, in the form that is kept until then."""

    @abstractmethod
    def weight(self, w: Float[Tensor, "N K"]) -> tuple[Quantized, Quantized]:
        """Quantise W for fprop, and Wᵀ for dgrad in the form that is kept until then."""

    @abstractmethod
    def gradient(self, dy: Float[Tensor, "M N"], draw: Draw | None) -> tuple[Quantized, Quantized]:
        """Quantise dY for dgrad and dYᵀ for wgrad."""

    def remember(self, operand: str, tensor: Tensor) -> None:  # noqa: B027, most need nothing
        """Take note of an operand of a training step; only delayed scaling does."""

    def _amax(self, operand: str, tensor: Tensor) -> Float[Tensor, ""] | None:
        """Return the largest magnitude where it is not the tensor's own."""
        reduce = self.reduce.get(operand)
        return None if reduce is None else reduce(tensor.abs().amax().float())


def multiply(left: Quantized, right: Quantized, dtype: torch.dtype) -> Float[Tensor, "M N"]:
    """Return left rightᵀ: decoded values multiplied in float32, scaled once, rounded once."""
    a, b = left.operand(), right.operand()
    result = a.values @ b.values.T
    if a.scale is not None and b.scale is not None:
        result *= a.scale * b.scale
    return result.to(dtype)


@dataclass(frozen=True)
class NVFP4Scheme(Scheme):
    """Blocks of 16; squares for weights; Hadamard transform and stochastic rounding in backward.

    Source: transformer_engine/common/recipe/__init__.py, NVFP4BlockScaling.
    """

    hadamard: bool = True
    stochastic: bool = True
    square_weights: bool = True

    def activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        return Quantized(nvfp4.quantize(x, amax=self._amax("x", x)))

    def kept_activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        turned = self._turned(x)
        return Quantized(nvfp4.quantize(turned, amax=self._amax("x", turned)).pack())

    def weight(self, w: Float[Tensor, "N K"]) -> tuple[Quantized, Quantized]:
        amax = self._amax("w", w)
        row = nvfp4.quantize(w, square=self.square_weights, amax=amax)
        if self.square_weights:  # the other direction has the same values
            return Quantized(row), Quantized(row.pack(), turned=True)
        return Quantized(row), Quantized(nvfp4.quantize(w.T.contiguous(), amax=amax).pack())

    def gradient(self, dy: Float[Tensor, "M N"], draw: Draw | None) -> tuple[Quantized, Quantized]:
        turned = self._turned(dy)
        row_bits = turned_bits = None
        if self.stochastic and draw is not None:
            rows, columns = dy.shape
            row_bits = draw.bits(rows, columns, stream=0, device=dy.device)
            turned_bits = draw.bits(turned.shape[1], columns, stream=1, device=dy.device).T
        row = nvfp4.quantize(dy, amax=self._amax("dy", dy), bits=row_bits)
        column = nvfp4.quantize(turned, amax=self._amax("dy", turned), bits=turned_bits)
        return Quantized(row), Quantized(column)

    def _turned(self, x: Tensor) -> Tensor:
        """Return xᵀ, whole chunks of tokens long, transformed where the scheme says so."""
        padded = F.pad(x, (0, 0, 0, -x.shape[0] % hadamard.SIZE))
        turned = padded.T.contiguous()
        return hadamard.transform(turned) if self.hadamard else turned


@dataclass(frozen=True)
class MXFP8Scheme(Scheme):
    """Blocks of 32 in E4M3 for every operand.

    Source: transformer_engine/common/recipe/__init__.py, MXFP8BlockScaling.
    """

    def activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        return Quantized(mxfp8.quantize(x))

    def kept_activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        return Quantized(mxfp8.quantize(x.T.contiguous()))

    def weight(self, w: Float[Tensor, "N K"]) -> tuple[Quantized, Quantized]:
        return Quantized(mxfp8.quantize(w)), Quantized(mxfp8.quantize(w.T.contiguous()))

    def gradient(self, dy: Float[Tensor, "M N"], draw: Draw | None) -> tuple[Quantized, Quantized]:
        return Quantized(mxfp8.quantize(dy)), Quantized(mxfp8.quantize(dy.T.contiguous()))


@dataclass(frozen=True)
class CurrentFP8Scheme(Scheme):
    """One scale for a tensor, from its own largest magnitude; gradients in E5M2.

    Source: transformer_engine/common/recipe/__init__.py, Float8CurrentScaling.
    """

    def activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        return Quantized(fp8.quantize_current(x, E4M3, amax=self._amax("x", x)))

    def kept_activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        return self.activation(x).turn()

    def weight(self, w: Float[Tensor, "N K"]) -> tuple[Quantized, Quantized]:
        found = Quantized(fp8.quantize_current(w, E4M3, amax=self._amax("w", w)))
        return found, found.turn()

    def gradient(self, dy: Float[Tensor, "M N"], draw: Draw | None) -> tuple[Quantized, Quantized]:
        found = Quantized(fp8.quantize_current(dy, E5M2, amax=self._amax("dy", dy)))
        return found, found.turn()


@dataclass(frozen=True)
class BlockFP8Scheme(Scheme):
    """Blocks of 128 for activations and gradients, squares of 128 for weights, all E4M3.

    Source: transformer_engine/common/recipe/__init__.py, Float8BlockScaling.
    """

    def activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        return Quantized(fp8.quantize_blocks(x))

    def kept_activation(self, x: Float[Tensor, "M K"]) -> Quantized:
        return Quantized(fp8.quantize_blocks(x.T.contiguous()))

    def weight(self, w: Float[Tensor, "N K"]) -> tuple[Quantized, Quantized]:
        found = Quantized(fp8.quantize_blocks(w, square=True))
        return found, found.turn()

    def gradient(self, dy: Float[Tensor, "M N"], draw: Draw | None) -> tuple[Quantized, Quantized]:
        turned = fp8.quantize_blocks(dy.T.contiguous())
        return Quantized(fp8.quantize_blocks(dy)), Quantized(turned)


SCHEMES: dict[str, Scheme] = {
    "nvfp4": NVFP4Scheme(),
    "mxfp8": MXFP8Scheme(),
    "fp8_current": CurrentFP8Scheme(),
    "fp8_block": BlockFP8Scheme(),
}
"""The scheme of each format that keeps nothing from step to step."""
