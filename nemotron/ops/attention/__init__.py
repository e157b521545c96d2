"""Causal grouped-query attention."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.attention import flash_attn, sdpa, varlen
from nemotron.ops.registry import Backend, Operation


class AttentionOp(Operation):
    """Attend causally; the queries are the last T of S positions, scale is Dh ** -0.5.

    Query head i reads key-value head i // (Hq / Hkv). `seq_idx` numbers the documents of all S
    positions and keeps them apart. With `lengths`, row b has `lengths[b]` positions, the first ones
    of S; its queries are the last T of those, and what lies after them is not read.
    """

    def __call__(
        self,
        q: Float[Tensor, "B T Hq Dh"],
        k: Float[Tensor, "B S Hkv Dh"],
        v: Float[Tensor, "B S Hkv Dh"],
        *,
        seq_idx: Int[Tensor, "B S"] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T Hq Dh"]:
        function = self.select(
            q,
            sizes=(q.shape[-1],),
            documents=seq_idx is not None,
            cache=k.shape[1] != q.shape[1],
            lengths=lengths is not None,
            documents_after_a_prefix=seq_idx is not None and k.shape[1] != q.shape[1],
        )
        return function(q, k, v, seq_idx, lengths)


def reference(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B S"] | None,
    lengths: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B T Hq Dh"]:
    """Softmax of scaled scores in float32 or wider over the keys that a query may see."""
    wide = torch.promote_types(q.dtype, torch.float32)
    length, total = q.shape[1], k.shape[1]
    repeat = q.shape[2] // k.shape[2]
    keys, values = (t.to(wide).repeat_interleave(repeat, dim=2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), keys) * q.shape[-1] ** -0.5
    position = torch.arange(total, device=q.device)
    if lengths is None:
        lengths = torch.full((q.shape[0],), total, device=q.device)
    else:
        # what lies after the row may be anything, also NaN, which 0 times would leave NaN
        values = values.masked_fill((position >= lengths[:, None])[..., None, None], 0.0)
    queries = lengths[:, None] - length + torch.arange(length, device=q.device)  # [B, T]
    seen = position <= queries.unsqueeze(-1)  # [B, T, S]
    if seq_idx is not None:
        own = seq_idx.gather(1, queries)
        seen = seen & (own.unsqueeze(-1) == seq_idx.unsqueeze(1))
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values).to(q.dtype)


attention = AttentionOp(
    "attention",
    [
        flash_attn.backend,
        varlen.backend,
        sdpa.backend,
        Backend(
            "reference",
            reference,
            features=frozenset({"documents", "cache", "lengths", "documents_after_a_prefix"}),
        ),
    ],
)
