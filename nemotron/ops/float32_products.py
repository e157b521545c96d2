"""Products of bfloat16 on CPUs that have no instructions for it: in float32, rounded once.

A product of two bfloat16 numbers is exact in float32, and sums are taken in float32 by any unit for
bfloat16 too. torch's own products of bfloat16 take five times as long there.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemotron.device import cpu_multiplies_bfloat16
from nemotron.ops.registry import Backend


def backend(function: Callable[..., Any], features: frozenset[str] = frozenset()) -> Backend:
    """Return the backend `float32_products` of an operation, which other CPUs use by name."""
    return Backend(
        "float32_products",
        function,
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.bfloat16}),
        features=features,
        by_name=cpu_multiplies_bfloat16(),
    )


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes bfloat16 tensors in float32; its (first) result is rounded."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        found = function(*map(_widened, arguments))
        if isinstance(found, tuple):
            return found[0].to(torch.bfloat16), *found[1:]
        return found.to(torch.bfloat16)

    return call


def _widened(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.dtype == torch.bfloat16:
        return argument.float()
    return argument
