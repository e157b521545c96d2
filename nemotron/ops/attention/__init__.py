"""Causal grouped-query attention."""

from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.attention import flash_attn, reference, sdpa, varlen
from nemotron.ops.registry import Operation


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


attention = AttentionOp(
    "attention", [flash_attn.backend, varlen.backend, sdpa.backend, reference.backend]
)
