"""Which tokens of a row each rank holds: head and tail, so that causal attention costs all alike.

A row is cut into 2 x size chunks, of which rank r holds chunk r and chunk 2 x size - 1 - r, side by
side. What needs the order of the row works chunk by chunk; nothing is ever shifted across ranks.
Source: NVIDIA/Megatron-LM: megatron/core/utils.py, get_batch_on_this_cp_rank.
"""

import torch
from jaxtyping import Shaped
from torch import Tensor


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Return the two chunks of a rank, in the order in which it holds them."""
    return rank, 2 * size - 1 - rank


def holder(chunk: int, size: int) -> tuple[int, int]:
    """Return the rank that holds a chunk, and whether it is its first (0) or second (1)."""
    return (chunk, 0) if chunk < size else (2 * size - 1 - chunk, 1)


def shard(
    values: Shaped[Tensor, "B T *rest"], rank: int, size: int
) -> Shaped[Tensor, "B Tl *rest"]:
    """Return a rank's tokens of whole rows."""
    length = values.shape[1]
    assert length % (2 * size) == 0, f"{length} tokens do not make {2 * size} chunks"
    chunks = values.chunk(2 * size, dim=1)
    return torch.cat([chunks[chunk] for chunk in chunks_of(rank, size)], dim=1)


def in_row_order(values: Shaped[Tensor, "B T *rest"], size: int) -> Shaped[Tensor, "B T *rest"]:
    """Put the ranks' tokens, which lie end to end, in the order of the row."""
    heads, tails = values.unflatten(1, (size, 2, -1)).unbind(2)
    return torch.cat([heads, tails.flip(1)], dim=1).flatten(1, 2)


def in_rank_order(values: Shaped[Tensor, "B T *rest"], size: int) -> Shaped[Tensor, "B T *rest"]:
    """Lay the ranks' tokens end to end: undo `in_row_order`."""
    heads, tails = values.unflatten(1, (2, size, -1)).unbind(1)
    return torch.stack([heads, tails.flip(1)], dim=2).flatten(1, 3)
