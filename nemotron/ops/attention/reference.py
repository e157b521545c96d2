"""Causal grouped-query attention, written out."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend


def attention(
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


backend = Backend(
    "reference",
    attention,
    features=frozenset({"documents", "cache", "lengths", "documents_after_a_prefix"}),
)
