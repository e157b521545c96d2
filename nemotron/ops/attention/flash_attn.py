"""The kernels of the package flash-attn; documents go in as sequences of varying length."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend


def attention(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B S"] | None,
    start: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B T Hq Dh"]:
    """Attend; like ours, its causal mask lines up the last query with the last key."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    assert start is None, "this backend does not have the feature"
    if seq_idx is None:
        return flash_attn_func(q, k, v, causal=True)
    first = torch.ones_like(seq_idx, dtype=torch.bool)
    first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    prefix = k.shape[1] - q.shape[1]
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))  # [B * T or S, heads, Dh]
    ends_k = ends_q = _ends(first.flatten())
    if prefix:
        # without the documents that end before the first query
        number = first.cumsum(1)
        needed = (number >= number[:, prefix : prefix + 1]).flatten()
        k, v, ends_k = k[needed], v[needed], _ends(first.flatten()[needed])
        queries = first[:, prefix:].clone()
        queries[:, 0] = True
        ends_q = _ends(queries.flatten())
    longest = torch.stack([ends.diff().max() for ends in (ends_q, ends_k)]).tolist()
    y = flash_attn_varlen_func(q, k, v, ends_q, ends_k, *longest, causal=True)
    return y.unflatten(0, (seq_idx.shape[0], -1))


def _ends(first: Bool[Tensor, " M"]) -> Int[Tensor, " N"]:
    """Return where documents begin, and the end, in rows laid end to end."""
    return F.pad(first.nonzero().flatten(), (0, 1), value=first.numel()).to(torch.int32)


backend = Backend(
    "flash_attn",
    attention,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16}),
    features=frozenset({"documents", "cache", "documents_after_a_prefix"}),
    packages=("flash_attn",),
    install="pip install 'flash-attn>=2.8' --no-build-isolation",
)
