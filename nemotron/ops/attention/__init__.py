"""Causal grouped-query attention."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemotron.ops import float32_products
from nemotron.ops.attention import flash_attn
from nemotron.ops.registry import Backend, Operation, int16_backend, lazy, numba_backend

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The kernels of torch that take any length at once."""
FEATURES = frozenset({"documents", "cache", "lengths", "documents_after_a_prefix"})


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


def reference(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B S"] | None,
    lengths: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B T Hq Dh"]:
    """Softmax of scaled scores in float32 or wider over the keys that a query may see."""
    wide = torch.promote_types(q.dtype, torch.float32)
    length, total = q.shape[1], k.shape[1]
    repeat = q.shape[2] // k.shape[2]
    keys, values = (t.to(wide).repeat_interleave(repeat, dim=2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), keys) * q.shape[-1] ** -0.5
    position = torch.arange(total, device=q.device)
    if lengths is None:
        lengths = torch.full((q.shape[0],), total, device=q.device)
    else:
        # what lies after the row may be anything, also NaN, which 0 times would leave NaN
        values = values.masked_fill((position >= lengths[:, None])[..., None, None], 0.0)
    queries = lengths[:, None] - length + torch.arange(length, device=q.device)  # [B, T]
    seen = position <= queries.unsqueeze(-1)  # [B, T, S]
    if seq_idx is not None:
        own = seq_idx.gather(1, queries)
        seen = seen & (own.unsqueeze(-1) == seq_idx.unsqueeze(1))
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values).to(q.dtype)


def sdpa(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B S"] | None,
    lengths: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B T Hq Dh"]:
    """torch's fused attention; on CPUs row by row and document by document, without a mask."""
    if (seq_idx is None and lengths is None) or q.device.type != "cpu":
        return _attend(q, k, v, seq_idx, lengths)
    ends = [k.shape[1]] * q.shape[0] if lengths is None else lengths.tolist()
    rows = []
    for row, end in enumerate(ends):
        ids = None if seq_idx is None else seq_idx[row, :end]
        rows.append(_attend_row(q[row, None], k[row, None, :end], v[row, None, :end], ids))
    return torch.cat(rows)


def _attend_row(
    q: Float[Tensor, "1 T Hq Dh"],
    k: Float[Tensor, "1 S Hkv Dh"],
    v: Float[Tensor, "1 S Hkv Dh"],
    seq_idx: Int[Tensor, " S"] | None,
) -> Float[Tensor, "1 T Hq Dh"]:
    if seq_idx is None:
        return _attend(q, k, v, None, None)
    prefix = k.shape[1] - q.shape[1]
    documents, end = [], 0
    for length in torch.unique_consecutive(seq_idx, return_counts=True)[1].tolist():
        begin, end = end, end + length
        if end > prefix:
            queries = q[:, max(0, begin - prefix) : end - prefix]
            documents.append(_attend(queries, k[:, begin:end], v[:, begin:end], None, None))
    return torch.cat(documents, dim=1)


def _attend(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B S"] | None,
    lengths: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B T Hq Dh"]:
    """One call for the whole batch, with a mask only where causality does not say it all."""
    length, total = q.shape[1], k.shape[1]
    mask = None
    is_causal = length == total and length > 1
    if lengths is not None:
        # what lies after a row may be anything; masked, a NaN would still reach the result
        beyond = (torch.arange(total, device=q.device) >= lengths[:, None])[..., None, None]
        k, v = k.masked_fill(beyond, 0.0), v.masked_fill(beyond, 0.0)
    if seq_idx is not None or lengths is not None or not (is_causal or length == 1):
        mask, is_causal = _seen(length, total, seq_idx, lengths, q.device), False
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
    length: int, total: int, seq_idx: Tensor | None, lengths: Tensor | None, device: torch.device
) -> Bool[Tensor, "B 1 T S"]:
    position = torch.arange(total, device=device)
    queries = position[total - length :, None]  # [T, 1]
    if lengths is not None:
        queries = queries + (lengths - total)[:, None, None]  # [B, T, 1]
    seen = position <= queries
    if seq_idx is not None:
        own = queries.squeeze(-1).expand(seq_idx.shape[0], -1)
        seen = seen & (seq_idx.gather(1, own).unsqueeze(-1) == seq_idx[:, None, :])
    return seen.view(-1, 1, length, total)


def _flash_limit(head_size: int) -> str | None:
    """Say which size of heads the flash kernels inside torch do not take, or return None."""
    if head_size % 8 or head_size > 256:
        return f"takes heads of a multiple of 8 up to 256 channels, not of {head_size}"
    return None


attention = AttentionOp(
    "attention",
    [
        flash_attn.backend,
        Backend(
            "varlen",
            lazy("nemotron.ops.attention.varlen", "attention"),
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.bfloat16}),
            features=frozenset({"documents", "cache", "documents_after_a_prefix"}),
            limit=_flash_limit,
        ),
        numba_backend("nemotron.ops.attention.numba", "attention", features=FEATURES),
        int16_backend("nemotron.ops.attention.int16", "attention", features=FEATURES),
        float32_products.backend(float32_products.in_float32(sdpa), features=FEATURES),
        Backend(
            "sdpa",
            sdpa,
            features=FEATURES,
        ),
        Backend(
            "reference",
            reference,
            features=FEATURES,
        ),
    ],
)
