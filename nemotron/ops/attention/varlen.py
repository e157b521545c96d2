"""The flash kernels inside torch, for rows of several documents: no mask, no work between them."""

import functools
import inspect
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.attention import sdpa
from nemotron.ops.attention.documents import sequences


def attention(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B S"] | None,
    lengths: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B T Hq Dh"]:
    """Attend by document; rows of one document are `sdpa`'s, which needs no mask for them."""
    from torch.nn.attention.varlen import varlen_attn

    assert lengths is None, "this backend does not have the feature"
    if seq_idx is None:
        return sdpa(q, k, v, None, None)
    parts = sequences(q, k, v, seq_idx)
    # a longest length of 1 would choose the kernels for decoding, which have no gradient
    parts = parts._replace(longest_q=max(2, parts.longest_q))
    y = varlen_attn(*parts, window_size=(-1, 0), **_fewer_key_heads())
    assert isinstance(y, Tensor), "nothing else was asked for"
    return y.unflatten(0, (seq_idx.shape[0], -1))


@functools.cache
def _fewer_key_heads() -> dict[str, Any]:
    """Return how to ask for grouped queries; torch 2.11 neither asks nor checks."""
    from torch.nn.attention.varlen import varlen_attn

    has_keyword = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if has_keyword else {}
