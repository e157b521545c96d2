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
    start: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B T Hq Dh"]:
    """Softmax of scaled scores in float32 or wider over the keys that a query may see."""
    wide = torch.promote_types(q.dtype, torch.float32)
    length, total = q.shape[1], k.shape[1]
    repeat = q.shape[2] // k.shape[2]
    keys, values = (t.to(wide).repeat_interleave(repeat, dim=2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), keys) * q.shape[-1] ** -0.5
    position = torch.arange(total, device=q.device)
    queries = position[total - length :]
    seen = (position <= queries[:, None]).expand(q.shape[0], -1, -1)  # [B, T, S]
    if seq_idx is not None:
        seen = seen & (seq_idx[:, total - length :, None] == seq_idx[:, None, :])
    if start is not None:
        # padding sees itself, so that its (unused) output stays finite
        seen = seen & ((position >= start[:, None, None]) | (position == queries[:, None]))
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values).to(q.dtype)


backend = Backend(
    "reference",
    attention,
    features=frozenset({"documents", "cache", "start", "documents_after_a_prefix"}),
)
