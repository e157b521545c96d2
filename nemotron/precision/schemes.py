"""Which operand of a linear layer's three products is quantised how, for each format.

fprop is X Wᵀ, dgrad is dY W, wgrad is dYᵀ X. Each contracts another dimension, so each operand is
needed along two: `row` along its last dimension, `turned` along its first.
Source: NVIDIA/TransformerEngine: transformer_engine/common/recipe/__init__.py.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.precision import fp8, hadamard, mxfp8, nvfp4
from nemotron.precision.formats import E2M1_MAX, E4M3, E5M2
from nemotron.precision.random_bits import random_bytes


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
class Draw:
    """What the random bits of a gradient hang on; nothing is drawn without it."""

    key: tuple[int, int]
    """Two 32-bit words that name seed, step and module."""
    first_token: int = 0
    """Number of the first row in the whole batch of the step."""


class Scheme(Protocol):
    """How one format treats the operands."""

    def activation(self, x: Float[Tensor, "M K"]) -> Operand:
        """Quantise X for fprop."""

    def kept_activation(self, x: Float[Tensor, "M K"]) -> "Kept":
        """Quantise Xᵀ for wgrad, in the form that is kept until then."""

    def weight(self, w: Float[Tensor, "N K"]) -> tuple[Operand, "Kept"]:
        """Quantise W for fprop, and Wᵀ for dgrad in the form that is kept until then."""

    def gradient(self, dy: Float[Tensor, "M N"], draw: Draw | None) -> tuple[Operand, Operand]:
        """Quantise dY for dgrad and dYᵀ for wgrad."""


class Kept(Protocol):
    """An operand in its quantised form."""

    def operand(self) -> Operand:
        """Decode it."""


def multiply(left: Operand, right: Operand) -> Float[Tensor, "M N"]:
    """Return left rightᵀ in float32: decoded values multiplied, then scaled once."""
    result = left.values @ right.values.T
    if left.scale is not None and right.scale is not None:
        result *= left.scale * right.scale
    return result


@dataclass(frozen=True)
class KeptNVFP4:
    """Codes and scales of a matrix, turned or not: 4.5 bits for each element."""

    matrix: nvfp4.PackedNVFP4
    turned: bool = False

    def operand(self) -> Operand:
        """Decode elements and block scales; the global scale is left to the product."""
        operand = _nvfp4_operand(self.matrix.unpack())
        return _turned(operand) if self.turned else operand


@dataclass(frozen=True)
class NVFP4Scheme:
    """Blocks of 16; squares for weights; Hadamard transform and stochastic rounding in backward.

    Source: transformer_engine/common/recipe/__init__.py, NVFP4BlockScaling.
    """

    hadamard: bool = True
    stochastic: bool = True
    square_weights: bool = True

    def activation(self, x: Float[Tensor, "M K"]) -> Operand:
        return _nvfp4_operand(nvfp4.quantize(x))

    def kept_activation(self, x: Float[Tensor, "M K"]) -> KeptNVFP4:
        return KeptNVFP4(nvfp4.quantize(self._turned(x)).pack())

    def weight(self, w: Float[Tensor, "N K"]) -> tuple[Operand, KeptNVFP4]:
        row = nvfp4.quantize(w, square=self.square_weights)
        if self.square_weights:  # the other direction has the same values
            return _nvfp4_operand(row), KeptNVFP4(row.pack(), turned=True)
        return _nvfp4_operand(row), KeptNVFP4(nvfp4.quantize(w.T.contiguous()).pack())

    def gradient(self, dy: Float[Tensor, "M N"], draw: Draw | None) -> tuple[Operand, Operand]:
        turned = self._turned(dy)
        row_bits = turned_bits = None
        if self.stochastic and draw is not None:
            columns = dy.shape[1]
            bits = partial(random_bytes, key=draw.key, first_row=draw.first_token, device=dy.device)
            row_bits = bits(dy.shape[0], columns, stream=0)
            turned_bits = bits(turned.shape[1], columns, stream=1).T
        return (
            _nvfp4_operand(nvfp4.quantize(dy, bits=row_bits)),
            _nvfp4_operand(nvfp4.quantize(turned, bits=turned_bits)),
        )

    def _turned(self, x: Tensor) -> Tensor:
        """Return xᵀ, whole chunks of tokens long, transformed where the scheme says so."""
        padded = F.pad(x, (0, 0, 0, -x.shape[0] % hadamard.SIZE))
        turned = padded.T.contiguous()
        return hadamard.transform(turned) if self.hadamard else turned


@dataclass(frozen=True)
class KeptFP8:
    """An FP8 matrix and its scales, turned or not."""

    matrix: mxfp8.MXFP8 | fp8.ScaledFP8
    turned: bool = False

    def operand(self) -> Operand:
        """Decode it."""
        operand = _fp8_operand(self.matrix)
        return _turned(operand) if self.turned else operand


@dataclass(frozen=True)
class MXFP8Scheme:
    """Blocks of 32 in E4M3 for every operand.

    Source: transformer_engine/common/recipe/__init__.py, MXFP8BlockScaling.
    """

    def activation(self, x: Float[Tensor, "M K"]) -> Operand:
        return _fp8_operand(mxfp8.quantize(x))

    def kept_activation(self, x: Float[Tensor, "M K"]) -> KeptFP8:
        return KeptFP8(mxfp8.quantize(x.T.contiguous()))

    def weight(self, w: Float[Tensor, "N K"]) -> tuple[Operand, KeptFP8]:
        turned = KeptFP8(mxfp8.quantize(w.T.contiguous()))
        return _fp8_operand(mxfp8.quantize(w)), turned

    def gradient(self, dy: Float[Tensor, "M N"], draw: Draw | None) -> tuple[Operand, Operand]:
        turned = mxfp8.quantize(dy.T.contiguous())
        return _fp8_operand(mxfp8.quantize(dy)), _fp8_operand(turned)


@dataclass(frozen=True)
class CurrentFP8Scheme:
    """One scale for a tensor, from its own largest magnitude; gradients in E5M2.

    Source: transformer_engine/common/recipe/__init__.py, Float8CurrentScaling.
    """

    def activation(self, x: Float[Tensor, "M K"]) -> Operand:
        return _fp8_operand(fp8.quantize_current(x, E4M3))

    def kept_activation(self, x: Float[Tensor, "M K"]) -> KeptFP8:
        return KeptFP8(fp8.quantize_current(x, E4M3), turned=True)

    def weight(self, w: Float[Tensor, "N K"]) -> tuple[Operand, KeptFP8]:
        found = fp8.quantize_current(w, E4M3)
        return _fp8_operand(found), KeptFP8(found, turned=True)

    def gradient(self, dy: Float[Tensor, "M N"], draw: Draw | None) -> tuple[Operand, Operand]:
        found = _fp8_operand(fp8.quantize_current(dy, E5M2))
        return found, _turned(found)


@dataclass(frozen=True)
class BlockFP8Scheme:
    """Blocks of 128 for activations and gradients, squares of 128 for weights, all E4M3.

    Source: transformer_engine/common/recipe/__init__.py, Float8BlockScaling.
    """

    def activation(self, x: Float[Tensor, "M K"]) -> Operand:
        return _fp8_operand(fp8.quantize_blocks(x))

    def kept_activation(self, x: Float[Tensor, "M K"]) -> KeptFP8:
        return KeptFP8(fp8.quantize_blocks(x.T.contiguous()))

    def weight(self, w: Float[Tensor, "N K"]) -> tuple[Operand, KeptFP8]:
        found = fp8.quantize_blocks(w, square=True)
        return _fp8_operand(found), KeptFP8(found, turned=True)

    def gradient(self, dy: Float[Tensor, "M N"], draw: Draw | None) -> tuple[Operand, Operand]:
        turned = fp8.quantize_blocks(dy.T.contiguous())
        return _fp8_operand(fp8.quantize_blocks(dy)), _fp8_operand(turned)


def _nvfp4_operand(found: nvfp4.NVFP4) -> Operand:
    return Operand(found.unscaled(), found.elements, E2M1_MAX, found.scale)


def _fp8_operand(found: mxfp8.MXFP8 | fp8.ScaledFP8) -> Operand:
    largest = torch.finfo(found.elements.dtype).max
    return Operand(found.dequantize(), found.elements, largest)


def _turned(operand: Operand) -> Operand:
    return replace(operand, values=operand.values.T, elements=operand.elements.T)


SCHEMES: dict[str, Scheme] = {
    "nvfp4": NVFP4Scheme(),
    "mxfp8": MXFP8Scheme(),
    "fp8_current": CurrentFP8Scheme(),
    "fp8_block": BlockFP8Scheme(),
}
"""The scheme of each format that a policy can name."""
