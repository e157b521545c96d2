"""torch's fused attention; on CPUs each document of a row is a call of its own."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemotron.ops.registry import Backend

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B S"] | None,
    start: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B T Hq Dh"]:
    """Attend by document on CPUs: no mask of the whole row, no work between documents."""
    if seq_idx is None or start is not None or q.device.type != "cpu":
        return _attend(q, k, v, seq_idx, start)
    prefix, rows = k.shape[1] - q.shape[1], []
    for row in range(q.shape[0]):
        lengths = torch.unique_consecutive(seq_idx[row], return_counts=True)[1].tolist()
        documents, end = [], 0
        for length in lengths:
            begin, end = end, end + length
            if end > prefix:
                queries = q[row : row + 1, max(0, begin - prefix) : end - prefix]
                keys, values = (t[row : row + 1, begin:end] for t in (k, v))
                documents.append(_attend(queries, keys, values, None, None))
        rows.append(torch.cat(documents, dim=1))
    return torch.cat(rows)


def _attend(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B S"] | None,
    start: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B T Hq Dh"]:
    """One call for the whole batch, with a mask only where causality does not say it all."""
    length, total = q.shape[1], k.shape[1]
    mask = None
    is_causal = length == total and length > 1
    if seq_idx is not None or start is not None or not (is_causal or length == 1):
        mask, is_causal = _seen(length, total, seq_idx, start, q.device), False
    with _kernels(q):
        return _call(q, k, v, mask, is_causal)


def _kernels(q: Tensor) -> AbstractContextManager[None]:
    """Keep cuDNN out of generation: it builds a plan for each length of a cache, in 30 ms."""
    if q.device.type != "cuda" or torch.is_grad_enabled():
        return nullcontext()
    return sdpa_kernel(WITHOUT_CUDNN)


def _call(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    mask: Bool[Tensor, "#B 1 T S"] | None,
    is_causal: bool,
) -> Float[Tensor, "B T Hq Dh"]:
    if q.shape[1] == 1:
        # the query heads of a key-value head stand in as queries: torch would copy the keys
        queries = q.view(q.shape[0], k.shape[2], -1, q.shape[3])  # [B, Hkv, R, Dh]
        y = F.scaled_dot_product_attention(queries, k.transpose(1, 2), v.transpose(1, 2), mask)
        return y.reshape_as(q)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def _seen(
    length: int, total: int, seq_idx: Tensor | None, start: Tensor | None, device: torch.device
) -> Bool[Tensor, "B 1 T S"]:
    position = torch.arange(total, device=device)
    seen = (position <= position[total - length :, None])[None]  # [1, T, S]
    if seq_idx is not None:
        seen = seen & (seq_idx[:, total - length :, None] == seq_idx[:, None, :])
    if start is not None:
        own = position == position[total - length :, None]
        # padding sees itself, so that no row of the softmax is empty
        seen = (seen & (position >= start[:, None, None])) | own
    return seen.unsqueeze(1)


backend = Backend(
    "sdpa",
    attention,
    features=frozenset({"documents", "cache", "start", "documents_after_a_prefix"}),
)
