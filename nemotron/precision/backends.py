"""How quantized products are computed: each number format by the fastest backend that has it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.errors import UserError
from nemotron.ops.registry import Backend, Call, lazy
from nemotron.precision import scaled_mm
from nemotron.precision.config import NVFP4Config
from nemotron.precision.linear import Product, quantized_grouped_linear, quantized_linear
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import Scheme, multiply
from nemotron.precision.transformer_engine import MULTIPLES, TransformerEngineLayer

Version = tuple[int, int]


class Layer(Protocol):
    """What replaces the call of a quantized module."""

    def linear(
        self, x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"], draw: Draw | None
    ) -> Float[Tensor, "M N"]:
        """Return X Wᵀ."""

    def grouped(
        self,
        x: Float[Tensor, "R K"],
        weight: Float[Tensor, "E N K"],
        counts: Int[Tensor, " E"],
        name: str,
        draw: Draw | None,
    ) -> Float[Tensor, "R N"]:
        """Multiply each expert's rows by its matrix; `name` is that of the stacked matrices."""


@dataclass(frozen=True)
class ProductLayer:
    """Operands are quantized here; a backend only multiplies them."""

    product: Product
    schemes: Mapping[str, Scheme]
    """Of each matrix by its name in the module."""

    def linear(self, x: Tensor, weight: Tensor, draw: Draw | None) -> Tensor:
        return quantized_linear(x, weight, self.schemes["weight"], draw, self.product)

    def grouped(
        self, x: Tensor, weight: Tensor, counts: Tensor, name: str, draw: Draw | None
    ) -> Tensor:
        return quantized_grouped_linear(x, weight, counts, self.schemes[name], draw, self.product)


@dataclass(frozen=True)
class FormatCall(Call):
    """A layer that a backend must be fit for, and the device's abilities."""

    format: str = ""
    capability: Version = (0, 0)
    """Compute capability of the GPU."""
    cuda: Version = (0, 0)
    """Version of CUDA that torch was built for."""
    shape: tuple[int, ...] = ()
    """Rows and columns of the weight."""


@dataclass(frozen=True)
class GPUs:
    """Which GPUs have a format in hardware, as one backend can use it."""

    first: Version
    last: Version = (99, 9)
    cuda: Version = (0, 0)

    def lacking(self, call: FormatCall) -> str | None:
        """Say what this machine lacks, or return None."""
        if not self.first <= call.capability <= self.last:
            wanted = f"{_dotted(self.first)} or newer"
            if self.last < (99, 9):
                wanted = f"{_dotted(self.first)} to {_dotted(self.last)}"
            return f"needs compute capability {wanted}, this GPU has {_dotted(call.capability)}"
        if call.cuda < self.cuda:
            return f"needs torch for CUDA {_dotted(self.cuda)} or newer, not {_dotted(call.cuda)}"
        return None


@dataclass(frozen=True)
class FormatBackend(Backend):
    """A way to compute the products of some formats."""

    gpus: Mapping[str, GPUs] = field(default_factory=dict)
    """GPUs for each format that it has on them."""
    cpu_formats: frozenset[str] = frozenset()
    """Formats that it has on a CPU."""
    cpu_operation: str | None = None
    """What torch must have for CPUs; older versions lack it."""
    without: Mapping[str, str] = field(default_factory=dict)
    """Why it cannot be used for a format that it might be thought to have."""
    multiples: Mapping[str, int] = field(default_factory=dict)
    """What a weight's sizes must be divisible by, for each format."""

    def unfit(self, call: Call) -> str | None:
        assert isinstance(call, FormatCall)
        if reason := super().unfit(call):
            return reason
        if call.format in self.without:
            return self.without[call.format]
        if call.device == "cpu":
            return self._unfit_cpu(call.format)
        if call.format not in self.gpus:
            return f"does not have {call.format}"
        if reason := self.gpus[call.format].lacking(call):
            return reason
        multiple = self.multiples.get(call.format, 1)
        if any(size % multiple for size in call.shape):
            return (
                f"takes multiples of {multiple}, not a weight of {' x '.join(map(str, call.shape))}"
            )
        return None

    def _unfit_cpu(self, format: str) -> str | None:
        if format not in self.cpu_formats:
            return f"does not have {format} on a CPU"
        name = self.cpu_operation
        if name and not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU"):
            return f"needs a torch with {name} on CPUs, which {torch.__version__} lacks"
        return None


ANY = GPUs((0, 0))
HOPPER, BLACKWELL = (9, 0), (10, 0)
FORMATS = ("fp8_delayed", "fp8_current", "fp8_block", "mxfp8", "nvfp4")
"""All that quantize."""


def _product_layer(product: Product) -> Callable[..., Layer]:
    def build(schemes: Mapping[str, Scheme], format: str, options: NVFP4Config) -> Layer:
        return ProductLayer(product, schemes)

    return build


def _transformer_engine_layer(
    schemes: Mapping[str, Scheme], format: str, options: NVFP4Config
) -> Layer:
    return TransformerEngineLayer(format, options)


BACKENDS = (
    FormatBackend(
        "transformer_engine",
        _transformer_engine_layer,
        devices=frozenset({"cuda"}),
        packages=("transformer_engine",),
        install="pip install 'transformer-engine[pytorch]>=2.14' --no-build-isolation",
        without={"fp8_delayed": "would keep the scales where no checkpoint finds them"},
        # fp8_block it has on newer GPUs as well, but with other scales, by way of MXFP8
        gpus={
            "fp8_current": GPUs((8, 9)),
            "fp8_block": GPUs(HOPPER, (9, 9), cuda=(12, 9)),
            "mxfp8": GPUs(BLACKWELL, (11, 9)),
            "nvfp4": GPUs(BLACKWELL, (11, 9)),
        },
        multiples=MULTIPLES,
    ),
    FormatBackend(
        "triton",
        lazy("nemotron.precision.fp8_layer", "build"),
        devices=frozenset({"cuda"}),
        features=frozenset({"split_operands"}),
        packages=("triton",),
        install="comes with torch for CUDA",
        imports=("nemotron.precision.fp8_layer",),
        gpus=dict.fromkeys(
            ("fp8_delayed", "fp8_current", "fp8_block"), GPUs(HOPPER, (9, 9), cuda=(12, 9))
        ),
    ),
    FormatBackend(
        "torch",
        _product_layer(scaled_mm.multiply),
        features=frozenset({"split_operands"}),
        cpu_formats=frozenset({"fp8_delayed", "fp8_current"}),
        cpu_operation="_scaled_mm_v2",
        gpus={
            "fp8_delayed": GPUs((8, 9)),
            "fp8_current": GPUs((8, 9)),
            "fp8_block": GPUs(HOPPER, (9, 9), cuda=(12, 9)),
            "mxfp8": GPUs(BLACKWELL),
            "nvfp4": GPUs(BLACKWELL),
        },
    ),
    FormatBackend(
        "emulate",
        _product_layer(multiply),
        features=frozenset({"split_operands"}),
        cpu_formats=frozenset(FORMATS),
        gpus=dict.fromkeys(FORMATS, ANY),
    ),
)
"""From the fastest to the one that has everything. `function` builds a `Layer`."""
BY_NAME = {backend.name: backend for backend in BACKENDS}


def format_call(
    format: str, device: torch.device, shape: Sequence[int] = (), *, is_split: bool = False
) -> FormatCall:
    """Return what a layer of this format asks for on a device of this machine.

    `is_split` says that ranks hold parts of an operand whose largest magnitude they share.
    """
    capability: Version = (0, 0)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
    major, _, rest = (torch.version.cuda or "0.0").partition(".")
    needs = frozenset({"split_operands"} if is_split else ())
    cuda = (int(major), int(rest.partition(".")[0]))
    return FormatCall(
        device.type, torch.bfloat16, needs, format, capability, cuda, tuple(shape[-2:])
    )


def in_order(device: str) -> Sequence[FormatBackend]:
    """Return the backends from the fastest on a device to the slowest.

    On a CPU torch's product of FP8 operands takes longer than that of decoded ones.
    """
    return BACKENDS if device == "cuda" else BACKENDS[::-1]


def choose(name: str, call: FormatCall, module: str) -> FormatBackend:
    """Return the backend of that name, or with `auto` the fastest that is fit.

    Raises:
        UserError: when the named one is not, saying what is missing and which are.
    """
    fit = [backend for backend in in_order(call.device) if backend.unfit(call) is None]
    if name == "auto":
        return fit[0]
    named = BY_NAME[name]
    if reason := named.unfit(call):
        others = " or ".join(backend.name for backend in fit)
        raise UserError(
            f"is not fit for {module} in {call.format}: {reason}; use auto or {others}.",
            key="precision.backend",
            value=name,
        )
    return named


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
