"""A kernel for AdamW in place of torch's, where a recipe names it.

It was compiled for Hopper and tested in Triton's interpreter; it has not run on a GPU yet.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron.errors import UserError
from nemotron.ops.registry import Call, triton_backend


class Settings(NamedTuple):
    """What is alike for all tensors of a call."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    coefficient: float
    """The gradients are multiplied by it, for clipping."""


Kernel = Callable[
    [
        list[Tensor],
        list[Tensor],
        list[Tensor],
        list[Tensor],
        list[Tensor],
        list[Tensor | None],
        Settings,
    ],
    None,
]
"""Updates contiguous float32 parameters with gradients, in place, and both of their moments.

Then come how many updates each had, this one included, and what else is to hold its new value, in a
dtype of its own: None where a parameter has no copy.
Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
"""

_triton = triton_backend(
    "nemotron.ops.adamw.triton",
    "adamw",
    dtypes=frozenset({torch.float32}),
)


def kernel_for(name: str, device: torch.device) -> Kernel | None:
    """Return the kernel of that name; None for that of torch.

    Raises:
        UserError: when it cannot be used on the device.
    """
    if name == "torch":
        return None
    if reason := _triton.unfit(Call(device.type, torch.float32)):
        rule = f"cannot be used: {reason}; or remove the key."
        raise UserError(rule, key="optimizer.kernel", value=name)
    return _triton.function
