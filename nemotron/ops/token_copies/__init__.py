"""Copies of tokens for their experts, and the sums of what the experts made of them.

Both functions describe the same matrix of R rows. `token` says which token each row is a copy of.
`place` lists the rows of all tokens' copies, token after token, and `starts` where each token's
begin in it: a token may have any number of copies, and rows of padding are in no list.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend, Operation, lazy
from nemotron.ops.token_copies import embedding_bag

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
    direction: Literal["copy", "add"],
) -> Float[Tensor, "after I"]:
    """Return the rows of tokens for `copy`, the tokens' sums of rows for `add`."""
    if direction == "copy":
        return values[token]
    wide = torch.promote_types(values.dtype, torch.float32)
    ends = torch.cat([starts[1:], starts.new_tensor([place.shape[0]])])
    number = torch.arange(place.shape[0], device=place.device)
    belongs = (number >= starts[:, None]) & (number < ends[:, None])  # [M, copies]
    return (belongs.to(wide) @ values.to(wide)[place]).to(values.dtype)


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
        embedding_bag.backend,
        Backend("reference", reference),
    ],
)
