"""Attention over a row that ranks share: each gathers all keys and values."""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.attention import AttentionOp
from nemotron.parallel.collectives import Group, all_gather, gather
from nemotron.parallel.context.chunks import chunks_of, in_row_order


class ContextAttention:
    """An `AttentionCore` for one rank's two chunks of each row.

    The queries of a chunk are the last of the positions up to the chunk's end, a case that every
    backend of `ops.attention` has; keys after it are not touched. With few key-value heads the keys
    and values are small: a rank receives 2 x Hkv x Dh x S x (cp - 1) / cp elements per row of S
    tokens (in bf16, with 2 heads of 128, 1 KiB a token), and sends as many gradients back.
    Source: Llama Team 2024, "The Llama 3 Herd of Models", section 3.3.2.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __call__(
        self,
        attention: AttentionOp,
        q: Float[Tensor, "B Tl Hq Dh"],
        k: Float[Tensor, "B Tl Hkv Dh"],
        v: Float[Tensor, "B Tl Hkv Dh"],
        *,
        seq_idx: Int[Tensor, "B Tl"] | None,
    ) -> Float[Tensor, "B Tl Hq Dh"]:
        # in one collective, so that its gradient is one, too
        whole = all_gather(torch.cat([k, v], dim=2), 1, self.group)
        k, v = in_row_order(whole, self.size).chunk(2, dim=2)
        documents = None
        if seq_idx is not None:
            documents = in_row_order(gather(seq_idx, 1, self.group), self.size)
        results = []
        for queries, chunk in zip(q.chunk(2, dim=1), chunks_of(self.rank, self.size), strict=True):
            end = (chunk + 1) * queries.shape[1]
            seen = None if documents is None else documents[:, :end]
            results.append(attention(queries, k[:, :end], v[:, :end], seq_idx=seen))
        return torch.cat(results, dim=1)
