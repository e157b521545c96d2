"""Copies by index; sums as bags of an embedding, whose rows torch adds up where they lie."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(place, starts)
        return x[token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum(grad, *ctx.saved_tensors), None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sum(rows, place, starts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (token,) = ctx.saved_tensors
        return grad[token], None, None, None


def _sum(rows: Tensor, place: Tensor, starts: Tensor) -> Tensor:
    # no atomic adds, one rounding, and no intermediate with a row for each copy
    return F.embedding_bag(place, rows.contiguous(), starts, mode="sum")


def token_copies(
    values: Float[Tensor, "before I"],
    token: Int[Tensor, " R"],
    place: Int[Tensor, " copies"],
    starts: Int[Tensor, " M"],
    direction: Literal["copy", "add"],
) -> Float[Tensor, "after I"]:
    """Each direction's gradient is the other direction."""
    function = _Copy if direction == "copy" else _Add
    return function.apply(values, token, place, starts)


backend = Backend("embedding_bag", token_copies)
