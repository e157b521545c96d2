"""Collectives that have a gradient: what each hands back is the adjoint of what it did.

Along one dimension, over one group. The gradient of a gather is the sum of the parts that every
rank hands back (reduce-scatter), and the other way round; nothing is ever averaged.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup

# torch 2.13 renamed them, and warns of the old names
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Join the ranks' parts along `dim`, in the order of the ranks; parts are alike in shape."""
    return _AllGather.apply(x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Add up the ranks' tensors and keep this rank's part along `dim`."""
    return _ReduceScatter.apply(x, dim, group)


def all_to_all(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Send `sent[r]` rows to rank r and return `received[r]` rows of each rank, in order."""
    return _AllToAll.apply(x, sent, received, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return scatter_sum(grad, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return scatter_sum(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gather(grad, ctx.dim, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Join the parts along `dim`, without a gradient."""
    world = dist.get_world_size(group)
    first = x.movedim(dim, 0).contiguous()
    whole = first.new_empty(world * first.shape[0], *first.shape[1:])
    all_gather_into(whole, first, group=group)
    return whole.movedim(0, dim)


def scatter_sum(x: Tensor, dim: int, group: Group) -> Tensor:
    """Add up and keep this rank's part along `dim`, without a gradient."""
    world = dist.get_world_size(group)
    first = x.movedim(dim, 0).contiguous()
    part = first.new_empty(first.shape[0] // world, *first.shape[1:])
    reduce_scatter_into(part, first, group=group)
    return part.movedim(0, dim)


def exchange(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Send rows to every rank and return what came, without a gradient."""
    result = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), received, sent, group=group)
    return result
