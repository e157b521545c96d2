"""Quantized layers of which ranks hold shards: scales, and random bits, as of the whole layer."""

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from nemotron.model.moe import Experts
from nemotron.parallel.collectives import Group
from nemotron.parallel.local import LocalModel
from nemotron.parallel.shards import Shard
from nemotron.precision.apply import Quantization
from nemotron.precision.policy import linear_layers

SPLIT_OPERANDS = {0: ("w", "dy"), 1: ("x", "w")}
"""Of a matrix cut along its outputs or inputs, the operands of which a rank has some columns."""


def connect(quantization: Quantization, local: LocalModel) -> None:
    """Give the quantized layers what this rank holds of them.

    Tokens that other ranks hold do not count for a scale, as in Transformer Engine; channels do.
    Source: NVIDIA/TransformerEngine: transformer_engine/pytorch/module/linear.py
    (amax_reduction_group of column- and row-parallel layers).
    """
    if local.mesh is None:
        return
    quantization.reduce_amax = lambda amaxes: _largest(amaxes, dist.group.WORLD)
    tp, size = local.mesh.rank("tp"), local.mesh.dims.tp

    def own_tokens(numbers: Int[Tensor, "B T"]) -> Int[Tensor, "B Tl"]:
        return numbers.chunk(size, dim=1)[tp]

    for model in local.models:
        for name in linear_layers(model):
            if isinstance(model.get_submodule(name), Experts):
                shard = local.shards.get(f"{name}.up_proj")
                first = 0 if shard is None else shard.ranges[0][0]
                rows = own_tokens if size > 1 else None
                quantization.set_shard(name, rows=rows, first_expert=first)
                continue
            shard = local.shards.get(f"{name}.weight")
            if shard is not None:
                group = local.mesh.group("tp")
                for operand in SPLIT_OPERANDS[shard.dim]:
                    quantization.set_reduction(name, operand, _Largest(group))
                quantization.set_shard(name, columns=_columns(shard))
            elif size > 1 and not name.endswith(("k_proj", "v_proj")):
                # these see this rank's tokens alone; whole key projections see the row
                quantization.set_shard(name, rows=own_tokens)


def _columns(shard: Shard) -> Int[Tensor, " n"] | int:
    """Return the numbers of a shard's outputs in the whole; those of inputs are all there."""
    if shard.dim != 0:
        return 0
    return torch.cat([torch.arange(first, last) for first, last in shard.ranges])


class _Largest:
    """Makes the largest of all ranks of a group."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(self, amax: Tensor) -> Tensor:
        return _largest(amax, self._group)


def _largest(amax: Tensor, group: Group | None) -> Tensor:
    largest = amax.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest
