"""The kernels of the package flash-attn; documents go in as sequences of varying length."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend


def attention(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B T"] | None,
    start: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B T Hq Dh"]:
    """Attend; like ours, its causal mask lines up the last query with the last key."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    assert start is None, "this backend does not have the feature"
    if seq_idx is None:
        return flash_attn_func(q, k, v, causal=True)
    ends, longest = _document_ends(seq_idx)
    flat = (tensor.flatten(0, 1) for tensor in (q, k, v))  # [B * T, heads, Dh]
    y = flash_attn_varlen_func(*flat, ends, ends, longest, longest, causal=True)
    return y.view_as(q)


def _document_ends(seq_idx: Int[Tensor, "B T"]) -> tuple[Int[Tensor, " N"], int]:
    """Return the documents' first tokens in all rows end to end, the end, and the longest."""
    first = torch.ones_like(seq_idx, dtype=torch.bool)
    first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = first.flatten().nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([seq_idx.numel()])])
    return ends.to(torch.int32), int(ends.diff().max())


backend = Backend(
    "flash_attn",
    attention,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16}),
    features=frozenset({"documents", "cache"}),
    packages=("flash_attn",),
    install="pip install 'flash-attn>=2.8' --no-build-isolation",
)
