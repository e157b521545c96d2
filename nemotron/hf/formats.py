"""How parameters lie on disk: each as one tensor, or as several that a format makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from pydantic import JsonValue
from torch import Tensor

Shape = tuple[int, ...]

STORED_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
}
"""Names of dtypes in a safetensors file."""


@dataclass(frozen=True)
class DiskTensor:
    """One tensor of an exported folder."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def stored_dtype(self) -> str:
        """Name of the dtype in the file, such as BF16."""
        return STORED_NAMES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Size of the data in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class DiskFormat(Protocol):
    """What one parameter becomes on disk: a tensor of its name, and others such as scales.

    `name` is that of the parameter, such as `lm_head.weight`. Its tensors have that name, names
    that begin with it, or names beside it, such as `lm_head.input_scale`.
    """

    @property
    def name(self) -> str:
        """What messages and the model card call the format."""

    def tensors(self, name: str, shape: Shape) -> Sequence[DiskTensor]:
        """Return the tensors of a parameter; none if the format cannot hold this shape."""

    def encode(self, name: str, master: Tensor) -> dict[str, Tensor]:
        """Return what belongs on disk, by name, for the float32 parameter."""

    def decode(self, name: str, stored: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """Return the values of a parameter of this shape, in a dtype that float32 contains."""


@dataclass(frozen=True)
class Plain:
    """The parameter itself, rounded to a dtype."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return STORED_NAMES[self.dtype]

    def tensors(self, name: str, shape: Shape) -> Sequence[DiskTensor]:
        return (DiskTensor(name, shape, self.dtype),)

    def encode(self, name: str, master: Tensor) -> dict[str, Tensor]:
        return {name: master.to(self.dtype).contiguous()}

    def decode(self, name: str, stored: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return stored[name]


BF16, F16, F32 = Plain(torch.bfloat16), Plain(torch.float16), Plain(torch.float32)

FORMATS: tuple[DiskFormat, ...] = (BF16, F16, F32)
"""Every format that is read; which one a parameter has is seen from its tensors."""


@dataclass(frozen=True)
class Formats:
    """The choice of an export: `rules` pair the end of a parameter's name with a format.

    The default must be able to hold every shape.
    """

    rules: tuple[tuple[str, DiskFormat], ...]
    default: DiskFormat = BF16
    named: Mapping[str, DiskFormat] = field(default_factory=dict)
    """Formats of single parameters, which come before the rules."""

    def of(self, name: str, shape: Shape) -> DiskFormat:
        """Return the format of a parameter: its own, that of the first rule that fits, or the
        default."""
        if (own := self.named.get(name)) is not None:
            return own
        for end, form in self.rules:
            if name.endswith(end) and form.tensors(name, shape):
                return form
        return self.default


RELEASED = Formats((("e_score_correction_bias", F32),))
"""As in the released checkpoints. Source: byte counts of Super and Ultra."""

MAMBA_FP32 = Formats((*RELEASED.rules, (".A_log", F32), (".D", F32), (".dt_bias", F32)))
"""Keeps the per-head vectors of Mamba-2 mixers, which released checkpoints round to bfloat16."""


def imported_formats(stored: Mapping[str, JsonValue], choice: Formats) -> Formats:
    """Return an export's choice for a model that was imported in these formats.

    `stored` is what the import noted: the most common format, and those of other parameters.
    """
    known, others = {form.name: form for form in FORMATS}, stored["others"]
    assert isinstance(others, dict)
    named = {name: known[str(form)] for name, form in others.items() if form in known}
    default = known.get(str(stored["default"]), choice.default)
    return Formats(choice.rules, default, named)


CHOICES = (RELEASED, MAMBA_FP32)
"""Every choice that `nemotron export` offers."""
