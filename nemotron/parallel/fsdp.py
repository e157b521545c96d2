"""Weights sharded over ranks and gathered when they are needed: FSDP2, and HSDP with copies.

Gradients are added up, never averaged: the loss is divided by the tokens of all ranks before.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import Linear
from nemotron.model.moe import Experts
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.mesh import Mesh

BLOCKS_AHEAD = 2
"""Blocks whose weights are gathered while one computes."""


def shard(model: HybridLM, root: nn.Module, mesh: Mesh, config: ParallelConfig) -> None:
    """Shard a model, or the stage of it that is here; `root` is what is called in training.

    Units are the layers, the prediction block, embedding and head; what is left belongs to the
    root. In bfloat16, matrices are gathered in bfloat16 as units of their own: decay, time step,
    norms, router and embedding compute in float32, so they are never rounded.
    """
    narrow = None if model.compute_dtype in (None, torch.float32) else model.compute_dtype
    reduce = torch.bfloat16 if config.reduce_dtype == "bf16" else torch.float32
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(narrow, reduce, cast_forward_inputs=False) if narrow else wide
    # stages of a pipeline compute many micro-batches with the same weights
    reshard = config.reshard_after_forward and mesh.dims.pp == 1
    blocks: list[nn.Module] = list(model.backbone.layers.children())
    blocks += [] if model.mtp is None else [model.mtp]
    for block in blocks:
        experts = [module for module in block.modules() if isinstance(module, Experts)]
        matrices: list[nn.Module] = [m for m in block.modules() if isinstance(m, Linear)]
        if mesh.efsdp.size() == mesh.fsdp.size() and mesh.dims.tp == 1:
            matrices += experts  # they are sharded over the same ranks
        else:
            for module in experts:
                fully_shard(
                    module,
                    mesh=mesh.efsdp,
                    mp_policy=rounded,
                    reshard_after_forward=reshard,
                    shard_placement_fn=_inside_experts(module, mesh.efsdp),
                )
        if narrow and matrices:
            fully_shard(matrices, mesh=mesh.fsdp, mp_policy=rounded, reshard_after_forward=reshard)
        fully_shard(block, mesh=mesh.fsdp, mp_policy=wide, reshard_after_forward=reshard)
    embeddings, head = model.backbone.embeddings, model.lm_head
    if not model.config.tie_word_embeddings:  # else both are the root's, which stays gathered
        if embeddings is not None:
            fully_shard(embeddings, mesh=mesh.fsdp, mp_policy=wide, reshard_after_forward=reshard)
        if head is not None:
            # used once for each depth of prediction, and first in backward
            fully_shard(head, mesh=mesh.fsdp, mp_policy=rounded, reshard_after_forward=False)
    if model.edit_heads is not None:
        fully_shard(model.edit_heads, mesh=mesh.fsdp, mp_policy=wide, reshard_after_forward=False)
    fully_shard(root, mesh=mesh.fsdp, mp_policy=wide, reshard_after_forward=False)
    _gather_ahead(blocks)
    if isinstance(head, FSDPModule):
        for method in ("loss", "token_logprobs", "compare", "chosen_logprobs"):
            register_fsdp_forward_method(head, method)
    for unit in units(root):
        unit.set_gradient_divide_factor(1.0)
        # gloo knows no sum with a factor; with this, and the factor 1, it is a plain sum
        unit.set_force_sum_reduction_for_comms(True)


def units(root: nn.Module) -> Iterator[FSDPModule]:
    """Yield every unit, the root included."""
    yield from (module for module in root.modules() if isinstance(module, FSDPModule))


def _gather_ahead(blocks: Sequence[nn.Module]) -> None:
    """Gather the weights of the next two blocks while one computes, forward and backward.

    By itself FSDP2 gathers as early as the host reaches a layer, and a host that waits for a number
    of the router reaches it late; backward gathers one unit ahead.
    """
    for index, block in enumerate(blocks):
        assert isinstance(block, FSDPModule), type(block)
        following = blocks[index + 1 : index + 1 + BLOCKS_AHEAD]
        before = blocks[max(index - BLOCKS_AHEAD, 0) : index]
        block.set_modules_to_forward_prefetch([u for b in following for u in units(b)])
        block.set_modules_to_backward_prefetch([u for b in reversed(before) for u in units(b)])


def drop_gathered(root: nn.Module) -> None:
    """Forget gathered weights: after an evaluation they would be stale when weights change."""
    for unit in units(root):
        unit.reshard()


def _inside_experts(experts: Experts, mesh: DeviceMesh):  # type: ignore[no-untyped-def]
    """Shard inside the matrices where there are fewer experts than ranks, so that none is idle."""
    dim = 1 if mesh.size(-1) > experts.up_proj.shape[0] else 0
    return lambda parameter: Shard(dim)
