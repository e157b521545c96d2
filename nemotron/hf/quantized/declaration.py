"""What a folder declares about its quantized layers, held against the tensors that are there."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemotron.errors import UserError
from nemotron.hf.formats import STORED_NAMES, DiskFormat, Shape
from nemotron.hf.names import DiskParameter
from nemotron.hf.quantized.assignment import CACHE_SCALES, is_linear
from nemotron.hf.quantized.layouts import FORMAT_NAMES, Layout
from nemotron.hf.quantized.linear import WEIGHT, QuantizedLinear, WithConstants, layer_of
from nemotron.hf.quantized.rules import Rules
from nemotron.hf.shards import StoredTensor
from nemotron.precision.formats import E4M3
from nemotron.precision.nvfp4 import BLOCK
from nemotron.precision.scales import StoredFormat

Specs = dict[str, tuple[Shape, torch.dtype]]
Stored = Mapping[str, StoredTensor]

DTYPES = {name: dtype for dtype, name in STORED_NAMES.items()}
SCALE_DTYPES = ("F32", "BF16", "F16")
CODES: dict[str, StoredFormat] = {"U8": "nvfp4", "F8_E4M3": "fp8"}
"""Dtypes in which codes lie in a file."""


@dataclass(frozen=True)
class Declaration:
    """The layout of a folder, the format of each layer, and where that is written."""

    layout: Layout
    rules: Rules
    has_cache: bool
    where: str

    def formatted(self, parameters: Sequence[DiskParameter], stored: Stored) -> list[DiskParameter]:
        """Return the parameters in the formats that are declared for them.

        Raises:
            UserError: when a tensor contradicts its declaration.
        """
        layers = {layer_of(p.name) for p in parameters if is_linear(p)}
        for name in self.rules.named:
            if name not in layers and name.replace("model.", "backbone.", 1) not in layers:
                rule = "is declared as quantized, but is not a linear layer of the model."
                raise UserError(rule, key=name, where=self.where)
        return [replace(p, format=self._format(p, stored)) for p in parameters]

    def notes(self, parameters: Sequence[DiskParameter]) -> tuple[str, ...]:
        """Say what was decoded, and what of the folder the model does not use."""
        counts = Counter(
            p.format.name for p in parameters if p.format.name in FORMAT_NAMES.values()
        )
        listed = ", ".join(f"{count:,} in {name}" for name, count in counts.items())
        notes = [
            f"quantized layers ({self.layout.name}: {listed or 'none'}) are decoded to float32; "
            "scales of their inputs and of the cache are not used"
        ]
        if unread := self.rules.unread:
            notes.append(
                f"{len(unread)} patterns of layers were not read ({unread[0][:60]} …): the tensors "
                "say which layers are quantized"
            )
        return tuple(notes)

    def _format(self, parameter: DiskParameter, stored: Stored) -> DiskFormat:
        layer, form = layer_of(parameter.name), parameter.format
        if not is_linear(parameter):
            return form
        quantized = self._quantized(parameter, stored)
        if quantized is not None:
            form = self._linear(parameter, quantized, stored)
        for end, key in CACHE_SCALES.items():
            if layer.endswith(end) and (entry := stored.get(f"{layer}.{key}")) is not None:
                self._check_cache(layer, key, stored)
                form = WithConstants(form, {key: _spec(entry, f"{layer}.{key}", self.where)})
        return form

    def _quantized(self, parameter: DiskParameter, stored: Stored) -> StoredFormat | None:
        """Return a layer's format, which declaration and tensors must agree about."""
        layer = layer_of(parameter.name)
        declared, seen = self.rules.of(layer), self._seen(layer, stored)
        if seen is None and f"{layer}.{WEIGHT}" not in stored:
            return declared
        if declared == seen or self.rules.unread:
            return seen
        rule = f"is declared as {_named(declared)}, but its tensors are {_named(seen)}; "
        advice = "the declaration must be that of the tensors."
        raise UserError(rule + advice, key=layer, where=self.where)

    def _seen(self, layer: str, stored: Stored) -> StoredFormat | None:
        """Return the format of a layer's codes, if it has any."""
        for format, code in self.layout.codes.items():
            entry = stored.get(f"{layer}.{code}")
            if entry is not None and CODES.get(entry.dtype) == format:
                return format
        return None

    def _linear(
        self, parameter: DiskParameter, format: StoredFormat, stored: Stored
    ) -> QuantizedLinear:
        """Return a layer's format, with the shapes that its scales have among those allowed."""
        layer, (rows, columns) = layer_of(parameter.name), parameter.shape
        specs: Specs = {}
        if format == "nvfp4":
            if columns % BLOCK:
                rule = f"cannot be NVFP4: its {columns} inputs are not a multiple of {BLOCK}."
                raise UserError(rule, key=layer, where=self.where)
            specs["weight_scale"] = ((rows, columns // BLOCK), E4M3.dtype)
            scalars = [self.layout.outer]
        else:
            scalars = ["weight_scale"]
        inputs = self.layout.inputs[format]
        if f"{layer}.{inputs}" in stored:
            scalars.append(inputs)
        for key in scalars:
            entry, name = stored.get(f"{layer}.{key}"), f"{layer}.{key}"
            by_row = rows if key == "weight_scale" else None
            missing = (self.layout.scalar, torch.float32)
            specs[key] = missing if entry is None else _spec(entry, name, self.where, by_row)
        return QuantizedLinear(self.layout, format, specs)

    def _check_cache(self, layer: str, key: str, stored: Stored) -> None:
        """Check that scales of keys and values are declared, and come in pairs."""
        if not self.has_cache:
            rule = "is there, but no cache of keys and values is declared as quantized."
            raise UserError(rule, key=f"{layer}.{key}", where=self.where)
        mixer = layer.rpartition(".")[0]
        for end, other in CACHE_SCALES.items():
            if (name := f"{mixer}{end}.{other}") not in stored:
                raise UserError(f"is missing; {layer}.{key} is there.", key=name, where=self.where)


def _named(format: StoredFormat | None) -> str:
    return "not quantized" if format is None else FORMAT_NAMES[format]


def check_constants(parameter: DiskParameter, own: Mapping[str, Tensor], where: str) -> None:
    """Check that scales are positive numbers and codes no NaN.

    Raises:
        UserError: when one is not.
    """
    form = check_scales(parameter, own.__getitem__, where)
    if isinstance(form, QuantizedLinear) and form.format == "fp8":
        code = f"{layer_of(parameter.name)}.{form.layout.codes[form.format]}"
        if bool((own[code].view(torch.uint8) & 0x7F == 0x7F).any()):
            raise UserError("holds NaN.", key=code, where=where)


def check_scales(parameter: DiskParameter, read: Callable[[str], Tensor], where: str) -> DiskFormat:
    """Check that scales are positive numbers; returns the format of the weight beside them.

    `read` gives the tensor of a name on disk.

    Raises:
        UserError: when one is not.
    """
    form, layer = parameter.format, layer_of(parameter.name)
    while isinstance(form, QuantizedLinear | WithConstants):
        for key in form.specs:
            _check_positive(f"{layer}.{key}", read(f"{layer}.{key}"), where)
        if isinstance(form, QuantizedLinear):
            break
        form = form.inner
    return form


def _check_positive(name: str, scale: Tensor, where: str) -> None:
    if scale.dtype == E4M3.dtype:
        # a block of zeros may have the scale 0
        if not bool((scale.view(torch.uint8) < 0x7F).all()):
            raise UserError("holds NaN or negative scales.", key=name, where=where)
    elif not bool(((scale > 0) & scale.isfinite()).all()):
        value = scale.flatten()[0].item() if scale.numel() == 1 else "a scale"
        raise UserError(f"is {value}; a scale must be a positive number.", key=name, where=where)


def _spec(
    entry: StoredTensor, name: str, where: str, rows: int | None = None
) -> tuple[Shape, torch.dtype]:
    """Return shape and dtype of a scale, checked: one number, or one for each row."""
    allowed = [(), (1,)] if rows is None else [(), (1,), (rows,), (rows, 1)]
    if entry.shape not in allowed or entry.dtype not in SCALE_DTYPES:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        rule = f"is {entry.dtype} {list(entry.shape)}; it must be a float of shape {shapes}."
        raise UserError(rule, key=name, where=where)
    return entry.shape, DTYPES[entry.dtype]
