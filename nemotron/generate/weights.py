"""New weights for a model that generates: all of them and the right ones, or none."""

from collections.abc import Iterable, Mapping

import torch
import xxhash
from torch import Tensor, nn


class WeightMismatch(ValueError):
    """The weights that came are not those of the model, or not those that were sent."""


def checksum(weights: Mapping[str, Tensor]) -> str:
    """Return a number for names, shapes, dtypes and values, whatever the order and device."""
    digest = xxhash.xxh128()
    for name in sorted(weights):
        tensor = weights[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.to("cpu").contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def load_weights(
    model: nn.Module, weights: Iterable[tuple[str, Tensor]], expected: str | None = None
) -> None:
    """Copy weights into the parameters and buffers of a model.

    `expected` is the `checksum` of what was sent. Nothing is copied before all has come and is
    right.

    Raises:
        WeightMismatch: when a name is missing, unknown or given twice, when a shape differs, or
            when the checksum does.
    """
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    for name, tensor in weights:
        if name in found:
            raise WeightMismatch(f"{name} was given twice; send each weight once.")
        found[name] = tensor
    if missing := sorted(own.keys() - found.keys()):
        raise WeightMismatch(f"{_listed(missing)} missing; send all weights of the model.")
    if unknown := sorted(found.keys() - own.keys()):
        raise WeightMismatch(f"{_listed(unknown)} not in the model; send its own weights only.")
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise WeightMismatch(
                f"{name} has shape {tuple(tensor.shape)}, but the model's is "
                f"{tuple(own[name].shape)}."
            )
    if expected is not None and (actual := checksum(found)) != expected:
        raise WeightMismatch(f"the checksum of the weights is {actual}, not {expected} as sent.")
    for name, tensor in found.items():
        own[name].copy_(tensor)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more + (" is" if len(names) == 1 else " are")
