"""Lay a built model out over ranks: stages, tensors, experts, rows, then sharded weights.

The model's own code knows none of it: parameters take their local shapes, hooks are put in the
places that the model offers for them, and every name stays that of the whole.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import routers
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.context import chunks
from nemotron.parallel.context.apply import SumOverRow, apply_context
from nemotron.parallel.expert import apply_experts, choose_dispatch
from nemotron.parallel.fsdp import drop_gathered, shard
from nemotron.parallel.local import LocalModel
from nemotron.parallel.mesh import Mesh
from nemotron.parallel.pipeline import Pipeline, sync_copies
from nemotron.parallel.shards import Shard, ShardedTensor, local_of
from nemotron.parallel.stages import Stage, cut, shared_parameters, split_stages
from nemotron.parallel.tensor import apply_tensor, sum_partial_gradients
from nemotron.parallel.whole import WholeMatrices


class DistributedModel(LocalModel):
    """What this rank holds of a model: all of it, stages of it, shards of its tensors."""

    def __init__(self, config: ModelConfig, models: list[HybridLM], mesh: Mesh) -> None:
        super().__init__(config, models)
        self._mesh = mesh
        self.copies: set[str] = set()
        """Parameters that an earlier stage of the pipeline holds, too."""

    @property
    def mesh(self) -> Mesh:
        """The groups of this rank."""
        return self._mesh

    @property
    def batch_rank(self) -> int:
        """Number of this rank among those, or groups of them, that read different rows."""
        return self.mesh.rank("batch")

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's sums of losses count: those of a `tp` group are one and the same."""
        return self.mesh.rank("tp") == 0

    @property
    def counts_rows(self) -> bool:
        """Whether this rank counts its rows: one does of those that share them."""
        return self.mesh.rank("row") == 0 and self.mesh.rank("pp") == 0

    def materialize(self, device: torch.device) -> None:
        """Give the tensors memory; what is in it is undefined."""
        for root in self.roots:
            root.to_empty(device=device)

    def drop_gathered(self) -> None:
        """Forget weights that were gathered to evaluate: they would be stale later."""
        for root in self.roots:
            drop_gathered(root)

    def share_tokens(self, values: Tensor) -> Tensor:
        """Return what belongs to this rank's tokens, of one tensor [B, T] or [B, T, …]."""
        if self.mesh.dims.cp == 1:
            return values
        return chunks.shard(values, self.mesh.rank("cp"), self.mesh.dims.cp)

    def token_numbers(self, first_row: int, rows: int, length: int) -> Int[Tensor, "B T"] | int:
        """Return the numbers in the whole batch of the tokens of some rows, if they are here.

        Where no rank shares a row, that of the first says it all.
        """
        if self.mesh.dims.cp * self.mesh.dims.tp * self.mesh.dims.ep == 1:
            return first_row * length
        numbers = torch.arange(rows * length).view(rows, length) + first_row * length
        return self.share_tokens(numbers)

    def sync_gradients(self, on: bool) -> None:
        """Say whether the next backward pass adds gradients up over ranks."""
        if self.pipeline is None:  # which does so at its end
            for root in self.roots:
                assert isinstance(root, FSDPModule)
                root.set_requires_gradient_sync(on)

    def finish_gradients(self) -> None:
        """Add up what several ranks have of the gradients of tensors that each of them holds.

        Those are the ranks of `tp`, and the first and last stage of a pipeline.
        """
        if self.mesh.dims.tp > 1:
            sum_partial_gradients(self.parameters(), self.partial, self.mesh.group("tp"))
        if self.mesh.ends is not None:
            for name in shared_parameters(self.config):
                sync_copies(self.parameter(name), self.mesh.ends)

    def counts(self, name: str) -> bool:
        """Say whether this rank counts a parameter where each element counts once."""
        is_whole_on_tp = name in self.partial
        return not (
            (self.mesh.dims.dp_replicate > 1 and self.mesh.rank("dp_replicate"))
            or (is_whole_on_tp and self.mesh.rank("tp"))
            or name in self.copies
        )

    def held(self, tensor: Tensor) -> Tensor:
        """Return this rank's shard, of a parameter or gradient that ranks share."""
        return local_of(tensor)

    def sharded(self, name: str, local: Tensor) -> Tensor:
        """Return a tensor of the shape of the local parameter as shards of the whole."""
        parameter = self.parameter(name)
        offsets: tuple[int, ...] = (0,) * parameter.ndim
        if isinstance(parameter, DTensor):
            _, offsets = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
        held = self.shards.get(name) or Shard.whole(parameter.shape)
        return ShardedTensor(held.shape, local.dtype, held.rectangles(local, tuple(offsets)))

    def whole_matrices(self) -> WholeMatrices:
        """Return what gathers matrices over ranks, where they hold shards of them."""
        return WholeMatrices(self.parameters(), self.shards, self.mesh)


def lay_out(
    build: Callable[[], HybridLM],
    mesh: Mesh,
    config: ParallelConfig,
    seq_len: int,
    num_depths: int,
    device: torch.device,
) -> DistributedModel:
    """Return what this rank holds of a model; the arguments are those of `distribute`."""
    dims = mesh.dims
    local = _stages(build, mesh, config, seq_len, num_depths)
    for model, root in zip(local.models, local.roots, strict=True):
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if dims.tp > 1:
            plan = apply_tensor(model, mesh.group("tp"), mesh.rank("tp"), dims.tp)
            local.shards |= plan.shards
            local.partial |= plan.replicated
        if dims.ep > 1:
            method = choose_dispatch(config, model.config, dims)
            kept = apply_experts(model, mesh.group("ep"), mesh.rank("ep"), dims.ep, method)
            local.shards |= {name: Shard(shapes[name], 0, (held,)) for name, held in kept.items()}
        if dims.cp > 1:
            apply_context(model, mesh.group("cp"), config)
        if dims.cp * dims.tp > 1:
            for router in routers(model).values():
                router.sum_over_row = SumOverRow(mesh.group("row"))
        shard(model, root, mesh, config)
    if dims.pp > 1:
        stages = [root for root in local.roots if isinstance(root, Stage)]
        local.pipeline = Pipeline(stages, mesh.group("pp"), config.pipeline, device, dims.tp)
    return local


def _stages(
    build: Callable[[], HybridLM],
    mesh: Mesh,
    config: ParallelConfig,
    seq_len: int,
    num_depths: int,
) -> DistributedModel:
    """Return the stages of this rank; without a pipeline, the whole model."""
    model, pp = build(), mesh.dims.pp
    if pp == 1:
        return DistributedModel(model.config, [model], mesh)
    num_stages = pp * config.pipeline.stages_per_rank
    layers = split_stages(model.config, config, num_stages, seq_len, num_depths)
    models, copies = [], set[str]()
    own = range(mesh.rank("pp"), num_stages, pp)
    for index in own:
        model = build()
        is_last = index == num_stages - 1
        copies |= set(cut(model, layers[index], is_first=index == 0, is_last=is_last))
        models.append(model)
    local = DistributedModel(model.config, models, mesh)
    local.roots = [Stage(m, i, num_stages) for m, i in zip(models, own, strict=True)]
    local.copies = copies
    return local
