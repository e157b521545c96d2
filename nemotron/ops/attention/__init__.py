"""Causal grouped-query attention."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.attention import flash_attn, sdpa, varlen
from nemotron.ops.registry import Backend, Operation


class AttentionOp(Operation):
    """Attend causally; the queries are the last T of S positions, scale is Dh ** -0.5.

    Query head i reads key-value head i // (Hq / Hkv). `seq_idx` numbers the documents of all S
    positions and keeps them apart; `start` hides the positions before `start[b]` from row b, except
    each from itself.
    """

    def __call__(
        self,
        q: Float[Tensor, "B T Hq Dh"],
        k: Float[Tensor, "B S Hkv Dh"],
        v: Float[Tensor, "B S Hkv Dh"],
        *,
        seq_idx: Int[Tensor, "B S"] | None = None,
        start: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T Hq Dh"]:
        function = self.select(
            q,
            sizes=(q.shape[-1],),
            documents=seq_idx is not None,
            cache=k.shape[1] != q.shape[1],
            start=start is not None,
            documents_after_a_prefix=seq_idx is not None and k.shape[1] != q.shape[1],
        )
        return function(q, k, v, seq_idx, start)


def reference(
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


attention = AttentionOp(
    "attention",
    [
        flash_attn.backend,
        varlen.backend,
        sdpa.backend,
        Backend(
            "reference",
            reference,
            features=frozenset({"documents", "cache", "start", "documents_after_a_prefix"}),
        ),
    ],
)
