"""The whole model on every rank, for rollouts between two steps."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from nemotron.model.adapter import is_adapter, merge_all
from nemotron.model.hybrid import HybridLM
from nemotron.parallel.local import LocalModel
from nemotron.parallel.runtime import Ranks
from nemotron.parallel.shards import Offsets, local_shards


@contextmanager
def whole_model(local: LocalModel, ranks: Ranks, *, plain: bool = False) -> Iterator[HybridLM]:
    """Yield the model with all its weights: the trained one itself, or a copy of its shards.

    With several ranks all of them enter together; the copy has no hooks of any layout, so that
    ranks may then use it as they like. With `plain` it is a copy in any case, without quantized
    layers, and with adapters merged into its weights.
    """
    if local.mesh is None and not plain:
        yield local.models[0]
        return
    with torch.device(local.device):
        copy = HybridLM(local.config)
    copy.compute_dtype = local.models[0].compute_dtype
    with torch.no_grad():
        for name, tensor in [*copy.named_parameters(), *copy.named_buffers()]:
            _collect(local, ranks, name, tensor)
        if adapters := [n for n in (*local.parameters(), *local.buffers()) if is_adapter(n)]:
            tensors = {name: _assemble(local, ranks, name) for name in adapters}
            copy.load_state_dict(merge_all(copy.state_dict() | tensors))
    yield copy


def _assemble(local: LocalModel, ranks: Ranks, name: str) -> Tensor:
    """Return a whole tensor whose shape follows from what the ranks hold of it."""
    pieces = {at: piece for part in ranks.gather(_held(local, name)) for at, piece in part.items()}
    shape = [
        max(at[dim] + piece.shape[dim] for at, piece in pieces.items())
        for dim in range(next(iter(pieces.values())).ndim)
    ]
    whole = torch.empty(shape)
    _place(pieces, whole)
    return whole.to(local.device)


def _place(pieces: Mapping[Offsets, Tensor], into: Tensor) -> None:
    for offsets, piece in pieces.items():
        box = tuple(slice(at, at + n) for at, n in zip(offsets, piece.shape, strict=True))
        into[box] = piece.to(into)


def _collect(local: LocalModel, ranks: Ranks, name: str, into: Tensor) -> None:
    """Fill a whole tensor with what each rank holds of it."""
    for pieces in ranks.gather(_held(local, name)):
        _place(pieces, into)


def _held(local: LocalModel, name: str) -> dict[Offsets, Tensor]:
    """Return what this rank holds of a tensor, by the offsets of each part in the whole."""
    if (parameter := local.parameters().get(name)) is not None:
        whole = local.sharded(name, local.held(parameter))
        return {at: part.detach().cpu() for at, part in local_shards(whole).items()}
    if (buffer := local.buffers().get(name)) is not None:
        return {(0,) * buffer.ndim: buffer.cpu()}
    return {}
