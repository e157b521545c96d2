"""Causal grouped-query attention."""

from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.attention import flash_attn, reference, sdpa, varlen
from nemotron.ops.registry import Operation

operation = Operation(
    "attention", [flash_attn.backend, varlen.backend, sdpa.backend, reference.backend]
)


def attention(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    *,
    seq_idx: Int[Tensor, "B S"] | None = None,
    start: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T Hq Dh"]:
    """Attend causally; the queries are the last T of S positions, scale is Dh ** -0.5.

    Query head i reads key-value head i // (Hq / Hkv). `seq_idx` numbers the documents of all S
    positions and keeps them apart; `start` hides the positions before `start[b]` from row b, except
    each from itself.
    """
    function = operation.select(
        q,
        documents=seq_idx is not None,
        cache=k.shape[1] != q.shape[1],
        start=start is not None,
        documents_after_a_prefix=seq_idx is not None and k.shape[1] != q.shape[1],
        any_head_size=q.shape[-1] % 8 != 0 or q.shape[-1] > 256,
    )
    return function(q, k, v, seq_idx, start)
