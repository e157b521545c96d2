"""Where documents begin and end, as kernels for sequences of varying length want it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Bounds(NamedTuple):
    """The documents of a batch whose rows are laid end to end."""

    ends: Int[Tensor, " N1"]
    """Where each begins, and the end of the last; int32."""
    longest: int


class Sequences(NamedTuple):
    """What varlen functions take, in their order; causality lines up the last query and key."""

    q: Float[Tensor, "queries Hq Dh"]
    k: Float[Tensor, "keys Hkv Dh"]
    v: Float[Tensor, "keys Hkv Dh"]
    ends_q: Int[Tensor, " N1"]
    ends_k: Int[Tensor, " N1"]
    longest_q: int
    longest_k: int


_known = WeakTensorKeyDictionary()
"""Bounds of tensors that are still alive, with the version of the tensor they were found for."""


def bounds(seq_idx: Int[Tensor, "B T"]) -> Bounds:
    """Return the documents of all rows.

    The host waits for the device once per tensor: all attention layers of a step get the same one.
    """
    version = -1 if seq_idx.is_inference() else seq_idx._version
    known = _known.get(seq_idx)
    if known is None or known[0] != version:
        known = _known[seq_idx] = (version, _find(seq_idx))
    return known[1]


def _find(seq_idx: Int[Tensor, "B T"]) -> Bounds:
    number = _begins(seq_idx).flatten().cumsum(0)  # documents begun so far
    # the begin of each document that there could be; those that are not begin at the end
    every = torch.arange(1, number.shape[0] + 2, device=number.device)
    ends = torch.searchsorted(number, every, out_int32=True)
    count, longest = torch.stack([number[-1], ends.diff().max()]).tolist()
    return Bounds(ends[: count + 1], longest)


def sequences(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B S"],
) -> Sequences:
    """Lay rows end to end; keys of documents that end before the first query are left out."""
    prefix = k.shape[1] - q.shape[1]
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    if not prefix:
        ends, longest = bounds(seq_idx)
        return Sequences(q, k, v, ends, ends, longest, longest)
    first = _begins(seq_idx)
    number = first.cumsum(1)
    needed = (number >= number[:, prefix : prefix + 1]).flatten()
    k, v, ends_k = k[needed], v[needed], _ends(first.flatten()[needed])
    queries = first[:, prefix:].clone()
    queries[:, 0] = True
    ends_q = _ends(queries.flatten())
    longest_q, longest_k = torch.stack([ends.diff().max() for ends in (ends_q, ends_k)]).tolist()
    return Sequences(q, k, v, ends_q, ends_k, longest_q, longest_k)


def _begins(seq_idx: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    first = torch.ones_like(seq_idx, dtype=torch.bool)
    first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return first


def _ends(first: Bool[Tensor, " M"]) -> Int[Tensor, " N1"]:
    return F.pad(first.nonzero().flatten(), (0, 1), value=first.numel()).to(torch.int32)
