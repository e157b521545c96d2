"""The weight of a linear layer as codes and scales, and a weight with constants beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemotron.hf.formats import DiskFormat, DiskTensor, Shape
from nemotron.hf.quantized.layouts import FORMAT_NAMES, Layout
from nemotron.precision.nvfp4 import BLOCK
from nemotron.precision.scales import StoredFormat
from nemotron.precision.stored import dequantize_weight, quantize_weight

WEIGHT = "weight"


def layer_of(name: str) -> str:
    """Return the name of the layer that a weight belongs to."""
    return name.removesuffix(f".{WEIGHT}")


@dataclass(frozen=True)
class QuantizedLinear:
    """A weight in FP8 or NVFP4; its scales are constants, which only encoding needs beforehand."""

    layout: Layout
    format: StoredFormat
    specs: Mapping[str, tuple[Shape, torch.dtype]] = field(hash=False)
    """Shape and dtype of each scale, by what follows the layer's name and a dot."""
    constants: Mapping[str, Tensor] | None = field(default=None, compare=False)
    """The scales by the same names."""

    @property
    def name(self) -> str:
        return FORMAT_NAMES[self.format]

    def tensors(self, name: str, shape: Shape) -> Sequence[DiskTensor]:
        if len(shape) != 2 or (self.format == "nvfp4" and shape[1] % BLOCK):
            return ()
        rows, columns = shape
        layer = layer_of(name)
        code = f"{layer}.{self.layout.codes[self.format]}"
        if self.format == "fp8":
            codes = DiskTensor(code, (rows, columns), torch.float8_e4m3fn)
        else:
            codes = DiskTensor(code, (rows, columns // 2), torch.uint8)
        return (codes, *_others(layer, self.specs))

    def encode(self, name: str, master: Tensor) -> dict[str, Tensor]:
        assert self.constants is not None, f"{name} has no scales to be encoded with"
        factors = self.layout.factors(self.format, self.constants)
        codes = quantize_weight(master, self.format, factors)
        layer = layer_of(name)
        return {
            f"{layer}.{self.layout.codes[self.format]}": codes,
            **{f"{layer}.{key}": tensor for key, tensor in self.constants.items()},
        }

    def decode(self, name: str, stored: Mapping[str, Tensor], shape: Shape) -> Tensor:
        layer = layer_of(name)
        constants = {key: stored[f"{layer}.{key}"] for key in self.specs}
        factors = self.layout.factors(self.format, constants)
        codes = stored[f"{layer}.{self.layout.codes[self.format]}"]
        return dequantize_weight(codes, self.format, factors)


@dataclass(frozen=True)
class WithConstants:
    """A weight in another format, and constants of its layer: scales of keys or values."""

    inner: DiskFormat
    specs: Mapping[str, tuple[Shape, torch.dtype]] = field(hash=False)
    constants: Mapping[str, Tensor] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return self.inner.name

    def tensors(self, name: str, shape: Shape) -> Sequence[DiskTensor]:
        inner = self.inner.tensors(name, shape)
        return (*inner, *_others(layer_of(name), self.specs)) if inner else ()

    def encode(self, name: str, master: Tensor) -> dict[str, Tensor]:
        assert self.constants is not None, f"{name} has no constants to be written"
        layer = layer_of(name)
        others = {f"{layer}.{key}": tensor for key, tensor in self.constants.items()}
        return self.inner.encode(name, master) | others

    def decode(self, name: str, stored: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return self.inner.decode(name, stored, shape)


def specs_of(constants: Mapping[str, Tensor]) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return shape and dtype of each constant."""
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in constants.items()}


def _others(layer: str, specs: Mapping[str, tuple[Shape, torch.dtype]]) -> tuple[DiskTensor, ...]:
    return tuple(DiskTensor(f"{layer}.{key}", *spec) for key, spec in specs.items())
