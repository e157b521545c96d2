"""Copies by index, sums by matrix product: the definition."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend


def token_copies(
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


backend = Backend("reference", token_copies)
