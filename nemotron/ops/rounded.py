"""Weights rounded to the dtype of products: copies that the optimizer keeps, or new ones.

A float32 weight is multiplied in bfloat16. Without a copy every product rounds it anew, in each
micro-batch: 6 bytes of traffic for each parameter. The optimizer, which has the new value in
registers anyway, writes the copy for 2.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_KEY = "rounded"


class Rounded(NamedTuple):
    """A copy in another dtype, and the version of the weight that it is of."""

    copy: Tensor
    version: int


class _Round(torch.autograd.Function):
    """The gradient is that of the weight, in the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def fresh_copy(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the copy of a weight in a dtype; None where there is none of its present value."""
    kept = vars(weight).get(_KEY)
    if kept is None or kept.version != weight._version or kept.copy.dtype != dtype:
        return None
    return kept.copy


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in a dtype, for products whose gradients are computed by hand."""
    copy = fresh_copy(weight, dtype)
    return weight.to(dtype) if copy is None else copy


def round_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in a dtype, as autograd sees it."""
    copy = fresh_copy(weight, dtype)
    return weight.to(dtype) if copy is None else _Round.apply(weight, copy)


@torch.no_grad()
def keep_rounded(weights: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Give each weight a copy in a dtype, which whoever changes the weight must `renew`.

    A weight that was changed by others is rounded anew until then.
    """
    for weight in weights:
        vars(weight)[_KEY] = Rounded(weight.to(dtype), weight._version)


def copy_of(weight: Tensor) -> Tensor | None:
    """Return the copy that a weight has, whatever value it is of."""
    kept = vars(weight).get(_KEY)
    return None if kept is None else kept.copy


def renew(weight: Tensor) -> None:
    """Say that the copy, if there is one, was written together with the weight."""
    kept = vars(weight).get(_KEY)
    if kept is not None:
        vars(weight)[_KEY] = kept._replace(version=weight._version)
