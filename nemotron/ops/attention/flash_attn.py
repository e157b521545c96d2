"""The kernels of the package flash-attn; documents go in as sequences of varying length."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.attention.documents import sequences
from nemotron.ops.registry import Backend


def attention(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B S"] | None,
    lengths: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B T Hq Dh"]:
    """Attend; like ours, its causal mask lines up the last query with the last key."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    assert lengths is None, "this backend does not have the feature"
    if seq_idx is None:
        return flash_attn_func(q, k, v, causal=True)
    y = flash_attn_varlen_func(*sequences(q, k, v, seq_idx), causal=True)
    return y.unflatten(0, (seq_idx.shape[0], -1))


backend = Backend(
    "flash_attn",
    attention,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16}),
    features=frozenset({"documents", "cache", "documents_after_a_prefix"}),
    packages=("flash_attn",),
    install="pip install 'flash-attn>=2.8' --no-build-isolation",
)
