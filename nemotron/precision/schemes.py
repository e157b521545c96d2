"""Which operand of a linear layer's three products is quantized how, for each format.

fprop is X Wᵀ, dgrad is dY W, wgrad is dYᵀ X. Each contracts another dimension, so each operand is
needed along two: `row` along its last dimension, `columnwise` along its first.
Source: NVIDIA/TransformerEngine: transformer_engine/common/recipe/__init__.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nemotron.precision import fp8, hadamard, mxfp8, nvfp4
from nemotron.precision.formats import E2M1_MAX, E4M3, E5M2
from nemotron.precision.groups import Groups, Sizes
from nemotron.precision.kernels import available
from nemotron.precision.random_bits import Draw

Reduce = Callable[[Tensor], Tensor]
"""Makes the largest magnitudes of whole tensors out of those of the parts that are held here."""
Matrix = nvfp4.NVFP4 | nvfp4.PackedNVFP4 | mxfp8.MXFP8 | fp8.ScaledFP8


@dataclass(frozen=True)
class Operand:
    """A decoded side of a product: `values`, times the `scale` of each tensor."""

    values: Float[Tensor, "M K"]
    """In float32."""
    elements: Tensor
    """[M, K]: what the codes alone stand for."""
    largest: float
    """Largest magnitude that a code stands for."""
    groups: Groups
    columnwise: bool
    scale: Float[Tensor, " G"] | None = None
    is_narrow: bool = False
    """Whether bfloat16 holds the values."""

    def narrow(self) -> "Operand":
        """Return it with values in bfloat16."""
        return replace(self, values=self.values.to(torch.bfloat16))

    def side(self, group: int) -> Float[Tensor, "rows contracted"]:
        """Return what one tensor brings to its product, before `scale`."""
        if self.columnwise:
            return self.values[self.groups.padded_rows(group)].T
        return self.values[self.groups.rows(group)]


@dataclass(frozen=True)
class Quantized:
    """A side of the products of some tensors, in codes and scales."""

    matrix: Matrix
    """The tensors one under another, padded."""
    groups: Groups
    columnwise: bool = False
    """Whether the products contract the matrix's rows, not its columns."""

    def operand(self) -> Operand:
        """Decode it; the scale of a whole tensor in NVFP4 is left to the product."""
        matrix = self.matrix.unpack() if isinstance(self.matrix, nvfp4.PackedNVFP4) else self.matrix
        if isinstance(matrix, nvfp4.NVFP4):
            values, elements, scale = matrix.unscaled(), matrix.elements, matrix.scales.outer
            return Operand(
                values, elements, E2M1_MAX, self.groups, self.columnwise, scale, is_narrow=True
            )
        largest = torch.finfo(matrix.elements.dtype).max
        values = matrix.dequantize()
        # 4 bits times a power of two; only below 2^-133 bfloat16 has fewer
        is_narrow = isinstance(matrix, mxfp8.MXFP8)
        return Operand(
            values, matrix.elements, largest, self.groups, self.columnwise, is_narrow=is_narrow
        )


def multiply(left: Quantized, right: Quantized, outs: Sequence[Float[Tensor, "M N"]]) -> None:
    """Write left rightᵀ of each tensor into `outs`.

    Decoded values are multiplied in float32, scaled once and rounded once. On a GPU those that
    bfloat16 holds are multiplied in it, with sums in float32, which takes a tenth of the time.
    """
    a, b = left.operand(), right.operand()
    is_narrow = a.is_narrow and b.is_narrow and a.values.device.type == "cuda"
    if is_narrow:
        a, b = a.narrow(), b.narrow()
    for group, out in enumerate(outs):
        x, y = a.side(group), b.side(group)
        # what one of them has more is padding, which is zero
        inner = min(x.shape[1], y.shape[1])
        x, y = x[:, :inner], y[:, :inner].T
        result = torch.mm(x, y, out_dtype=torch.float32) if is_narrow else x @ y
        if a.scale is not None and b.scale is not None:
            result *= a.scale[group] * b.scale[group]
        out.copy_(result)


@dataclass(frozen=True)
class Scheme(ABC):
    """How one format treats the operands of a layer: `x`, `w` and `dy`."""

    multiple: ClassVar[int] = 1
    """Rows of a block: a tensor's are padded to a multiple of it."""
    reduce: Mapping[str, Reduce] = field(default_factory=dict, kw_only=True)
    """For each operand of which this process holds a shard, how to know the whole's magnitude."""

    def quantize(
        self,
        operand: str,
        tensor: Float[Tensor, "M K"],
        sizes: Sizes | None = None,
        *,
        draw: Draw | None = None,
        both: bool = True,
    ) -> tuple[Quantized, Quantized | None]:
        """Return an operand as a side that contracts its columns, and as one that contracts rows.

        The second is in the form in which it is kept for backward; `both` says whether it is
        needed. `sizes` are the rows of each expert, which lie one under another; `draw` names the
        random bits of a gradient's rounding.
        """
        groups = Groups((tensor.shape[0],) if sizes is None else sizes, self.multiple)
        row, columnwise = self._matrices(operand, groups.pad(tensor), groups, draw, both=both)
        if columnwise is None:
            return Quantized(row, groups), None
        return Quantized(row, groups), Quantized(columnwise, groups, columnwise=True)

    def for_experts(self, experts: slice) -> "Scheme":
        """Return how some of the experts are treated; only delayed scaling knows one by one."""
        return self

    def remember(  # noqa: B027, most need nothing
        self, operand: str, tensor: Float[Tensor, "M K"], sizes: Sizes | None = None
    ) -> None:
        """Take note of an operand of a training step; only delayed scaling does."""

    @abstractmethod
    def _matrices(
        self, operand: str, padded: Tensor, groups: Groups, draw: Draw | None, *, both: bool
    ) -> tuple[Matrix, Matrix | None]:
        """Quantize along the columns, and along the rows where both are needed."""

    def _amax(self, operand: str, padded: Tensor, groups: Groups) -> Float[Tensor, " G"] | None:
        """Return the largest magnitude of each tensor where it is not that of what is here."""
        return self._whole(operand, groups.amax(padded)) if operand in self.reduce else None

    def _whole(self, operand: str, amax: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
        """Return the largest magnitude of each whole tensor, of which ranks may hold parts."""
        reduce = self.reduce.get(operand)
        return amax if reduce is None else reduce(amax)


@dataclass(frozen=True)
class NVFP4Scheme(Scheme):
    """Blocks of 16; squares for weights; Hadamard transform and stochastic rounding in backward.

    Source: transformer_engine/common/recipe/__init__.py, NVFP4BlockScaling.
    """

    multiple: ClassVar[int] = nvfp4.BLOCK
    hadamard: bool = True
    stochastic: bool = True
    square_weights: bool = True

    def _matrices(
        self, operand: str, padded: Tensor, groups: Groups, draw: Draw | None, *, both: bool
    ) -> tuple[Matrix, Matrix | None]:
        wide = padded.float()
        is_square = operand == "w" and self.square_weights
        is_stochastic = operand == "dy" and self.stochastic
        numbered = draw.pad(groups) if is_stochastic and draw is not None else None
        if (fast := available.of_blocks(padded)) and (
            numbered is None or isinstance(numbered.columns, int)
        ):
            return self._by_kernels(fast, operand, padded, groups, numbered, both=both)
        row = nvfp4.quantize(
            wide,
            height=nvfp4.BLOCK if is_square else 1,
            groups=groups,
            amax=self._amax(operand, wide, groups),
            bits=_bits(numbered, wide, stream=0),
        )
        if is_square:  # the other direction has the same values
            return row, row.pack() if both else None
        if not both:
            return row, None
        is_transformed = operand != "w" and self.hadamard
        tokens = hadamard.transform(wide).float() if is_transformed else wide
        columnwise = nvfp4.quantize(
            tokens,
            height=nvfp4.BLOCK,
            width=1,
            groups=groups,
            amax=self._amax(operand, tokens, groups),
            bits=_bits(numbered, wide, stream=1),
        )
        return row, columnwise if operand == "dy" else columnwise.pack()

    def _by_kernels(
        self,
        fast: ModuleType,
        operand: str,
        padded: Tensor,
        groups: Groups,
        draw: Draw | None,
        *,
        both: bool,
    ) -> tuple[Matrix, Matrix | None]:
        """Do it in two reads: one for the magnitudes of whole tensors, one that quantizes."""
        is_square = operand == "w" and self.square_weights
        is_transformed = operand != "w" and self.hadamard
        needs_columnwise = both and not is_square
        amaxes = [
            self._whole(operand, groups.largest(bands, nvfp4.BLOCK))
            for bands in fast.band_magnitudes(
                padded, columnwise=needs_columnwise, transformed=is_transformed
            )
        ]
        high = padded.shape[0] // nvfp4.BLOCK
        factors = [
            [factor.expand(high, 1).contiguous() for factor in found]
            for found in (nvfp4.global_factors(amax, groups, nvfp4.BLOCK) for amax in amaxes)
        ]
        seeds, first = None, 0
        if draw is not None:
            assert isinstance(draw.columns, int)
            device, first = padded.device, draw.columns
            seeds = [draw.seeds(len(padded), stream=stream, device=device) for stream in (0, 1)]
        found = fast.nvfp4(
            padded,
            factors[0],
            factors[-1] if needs_columnwise else None,
            square=is_square,
            transformed=is_transformed,
            seeds=seeds,
            first=first,
        )
        heights, widths = (nvfp4.BLOCK if is_square else 1, nvfp4.BLOCK), (nvfp4.BLOCK, 1)
        matrices = [
            nvfp4.NVFP4(elements, nvfp4.Scales(scales, amax, groups, height, width))
            for (elements, scales), amax, height, width in zip(
                found, amaxes, heights, widths, strict=False
            )
        ]
        row, columnwise = matrices[0], matrices[-1]
        if not both:
            return row, None
        return row, columnwise if operand == "dy" else columnwise.pack()


def _bits(draw: Draw | None, padded: Tensor, stream: int) -> UInt8[Tensor, "M N"] | None:
    if draw is None:
        return None
    return draw.bits(*padded.shape, stream=stream, device=padded.device)


@dataclass(frozen=True)
class MXFP8Scheme(Scheme):
    """Blocks of 32 in E4M3 for every operand.

    Source: transformer_engine/common/recipe/__init__.py, MXFP8BlockScaling.
    """

    multiple: ClassVar[int] = mxfp8.BLOCK

    def _matrices(
        self, operand: str, padded: Tensor, groups: Groups, draw: Draw | None, *, both: bool
    ) -> tuple[Matrix, Matrix | None]:
        if fast := available.of_blocks(padded):
            (elements, scales), across = fast.mxfp8(padded, both=both)
            row = mxfp8.MXFP8(elements, scales, 1, mxfp8.BLOCK)
            if across is None:
                return row, None
            elements, scales = across
            return row, mxfp8.MXFP8(elements, scales, mxfp8.BLOCK, 1)
        row = mxfp8.quantize(padded)
        return row, mxfp8.quantize(padded, height=mxfp8.BLOCK, width=1) if both else None


@dataclass(frozen=True)
class CurrentFP8Scheme(Scheme):
    """One scale for a tensor, from its own largest magnitude; gradients in E5M2.

    Source: transformer_engine/common/recipe/__init__.py, Float8CurrentScaling.
    """

    def _matrices(
        self, operand: str, padded: Tensor, groups: Groups, draw: Draw | None, *, both: bool
    ) -> tuple[Matrix, Matrix | None]:
        amax = self._amax(operand, padded, groups)
        found = fp8.quantize_current(padded, PER_TENSOR[operand], groups=groups, amax=amax)
        return found, found


@dataclass(frozen=True)
class BlockFP8Scheme(Scheme):
    """Blocks of 128 for activations and gradients, squares of 128 for weights, all E4M3.

    Source: transformer_engine/common/recipe/__init__.py, Float8BlockScaling.
    """

    multiple: ClassVar[int] = fp8.BLOCK

    def _matrices(
        self, operand: str, padded: Tensor, groups: Groups, draw: Draw | None, *, both: bool
    ) -> tuple[Matrix, Matrix | None]:
        if operand == "w":
            squares = fp8.quantize_blocks(padded, height=fp8.BLOCK)
            return squares, squares
        row = fp8.quantize_blocks(padded)
        return row, fp8.quantize_blocks(padded, height=fp8.BLOCK, width=1) if both else None


PER_TENSOR = {"x": E4M3, "w": E4M3, "dy": E5M2}
"""Elements of each operand that has one scale (TE's HYBRID)."""
SCHEMES: dict[str, Scheme] = {
    "nvfp4": NVFP4Scheme(),
    "mxfp8": MXFP8Scheme(),
    "fp8_current": CurrentFP8Scheme(),
    "fp8_block": BlockFP8Scheme(),
}
"""The scheme of each format that keeps nothing from step to step."""
