"""Causal grouped-query attention."""

from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.attention import flash_attn, reference, sdpa, varlen
from nemotron.ops.registry import Operation


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


attention = AttentionOp(
    "attention", [flash_attn.backend, varlen.backend, sdpa.backend, reference.backend]
)
