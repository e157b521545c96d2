"""Copies of tokens for their experts, and the sums of what the experts made of them.

Both functions describe the same matrix of R rows. `token` says which token each row is a copy of.
`place` lists the rows of all tokens' copies, token after token, and `starts` where each token's
begin in it: a token may have any number of copies, and rows of padding are in no list.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend, Operation, lazy

Direction = Literal["copy", "add"]


class TokenCopiesOp(Operation):
    """Copy tokens to rows and add up rows of tokens; each is the other's gradient."""

    def copy(
        self,
        x: Float[Tensor, "M I"],
        token: Int[Tensor, " R"],
        place: Int[Tensor, " copies"],
        starts: Int[Tensor, " M"],
    ) -> Float[Tensor, "R I"]:
        """Copy each token to its rows; a token's gradient is the sum of those of its copies."""
        return self.select(x)(x, token, place, starts, "copy")

    def add(
        self,
        rows: Float[Tensor, "R I"],
        token: Int[Tensor, " R"],
        place: Int[Tensor, " copies"],
        starts: Int[Tensor, " M"],
    ) -> Float[Tensor, "M I"]:
        """Add up the rows of each token in the order of `place`; 0 where it has none.

        Sums are taken in float32 or wider and rounded once. Rows of padding get the gradient of the
        token that `token` names, so whoever made them must give them no weight.
        """
        return self.select(rows)(rows, token, place, starts, "add")


def reference(
    values: Float[Tensor, "before I"],
    token: Int[Tensor, " R"],
    place: Int[Tensor, " copies"],
    starts: Int[Tensor, " M"],
    direction: Direction,
) -> Float[Tensor, "after I"]:
    """Return the rows of tokens for `copy`, the tokens' sums of rows for `add`."""
    if direction == "copy":
        return values[token]
    wide = torch.promote_types(values.dtype, torch.float32)
    ends = torch.cat([starts[1:], starts.new_tensor([place.shape[0]])])
    number = torch.arange(place.shape[0], device=place.device)
    belongs = (number >= starts[:, None]) & (number < ends[:, None])  # [M, copies]
    return (belongs.to(wide) @ values.to(wide)[place]).to(values.dtype)


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


def embedding_bag(
    values: Float[Tensor, "before I"],
    token: Int[Tensor, " R"],
    place: Int[Tensor, " copies"],
    starts: Int[Tensor, " M"],
    direction: Direction,
) -> Float[Tensor, "after I"]:
    """Copies by index; sums as bags of an embedding, whose rows torch adds up where they lie.

    Each direction's gradient is the other direction.
    """
    function = _Copy if direction == "copy" else _Add
    return function.apply(values, token, place, starts)


token_copies = TokenCopiesOp(
    "token_copies",
    [
        Backend(
            "triton",
            lazy("nemotron.ops.token_copies.triton", "token_copies"),
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.bfloat16, torch.float32}),
            packages=("triton",),
            install="comes with torch for CUDA",
            imports=("nemotron.ops.token_copies.triton",),
        ),
        Backend("embedding_bag", embedding_bag),
        Backend("reference", reference),
    ],
)
