"""A hash of the scales of an export, which vouches for those that its check reads."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import xxhash
from torch import Tensor

from nemotron.hf.names import DiskParameter
from nemotron.hf.quantized.linear import QuantizedLinear, WithConstants, layer_of


def constants_of(parameter: DiskParameter) -> dict[str, Tensor]:
    """Return the scales that a parameter was given, by their names on disk."""
    form, layer = parameter.format, layer_of(parameter.name)
    if not isinstance(form, QuantizedLinear | WithConstants):
        return {}
    own = {f"{layer}.{key}": tensor for key, tensor in (form.constants or {}).items()}
    if isinstance(form, WithConstants):
        own |= constants_of(replace(parameter, format=form.inner))
    return own


def with_constants(parameter: DiskParameter, read: Callable[[str], Tensor]) -> DiskParameter:
    """Return the parameter with the scales that `read` gives for their names on disk."""
    form = parameter.format
    layer = layer_of(parameter.name)
    if isinstance(form, WithConstants):
        inner = with_constants(replace(parameter, format=form.inner), read).format
        own = {key: read(f"{layer}.{key}") for key in form.specs}
        return replace(parameter, format=replace(form, inner=inner, constants=own))
    if isinstance(form, QuantizedLinear):
        own = {key: read(f"{layer}.{key}") for key in form.specs}
        return replace(parameter, format=replace(form, constants=own))
    return parameter


def digest_of_constants(parameters: Iterable[DiskParameter]) -> str | None:
    """Return a hash of the names and bytes of all scales; None where there are none."""
    hashed, count = xxhash.xxh128(), 0
    for parameter in parameters:
        for name, tensor in sorted(constants_of(parameter).items()):
            hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            count += 1
    return hashed.hexdigest() if count else None
