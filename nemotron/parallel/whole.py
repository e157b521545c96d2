"""Whole matrices from what ranks hold of a parameter, and a rank's part of the whole again."""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardOfMesh
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nemotron.model.init import STACKED
from nemotron.parallel.mesh import Mesh
from nemotron.parallel.shards import Shard


class WholeMatrices:
    """Gathers matrices over the ranks of FSDP and tensor parallelism.

    Experts stay where they are: each is a matrix of its own, so of a stack only what is cut inside
    an expert is gathered. All ranks that share a parameter must call for it in the same order.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], shards: dict[str, Shard], mesh: Mesh
    ) -> None:
        self._parameters, self._shards, self._mesh = parameters, shards, mesh

    def is_here(self, name: str) -> bool:
        """Say whether every rank holds whole matrices of the parameter, or none."""
        parameter = self._parameters[name]
        cuts = set[int]()
        if isinstance(parameter, DTensor):
            cuts = {p.dim for p in parameter.placements if isinstance(p, ShardOfMesh)}
        if (shard := self._shards.get(name)) is not None:
            cuts.add(shard.dim)
        return not cuts or (name.endswith(STACKED) and cuts == {0})

    def gather(self, name: str, held: Tensor) -> Tensor:
        """Return the whole of a tensor of which each rank holds as much as of the parameter."""
        parameter, shard = self._parameters[name], self._shards.get(name)
        if isinstance(parameter, DTensor):
            held = DTensor.from_local(
                held,
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
            ).full_tensor()
        if shard is None or name.endswith(STACKED):
            return held
        whole = held.new_zeros(shard.shape)
        for offsets, piece in shard.rectangles(held).items():
            at = [slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True)]
            whole[tuple(at)] = piece
        dist.all_reduce(whole, group=self._mesh.group("tp"))
        return whole

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return what this rank holds of the parameter, out of a whole tensor."""
        parameter, shard = self._parameters[name], self._shards.get(name)
        if shard is not None and not name.endswith(STACKED):
            whole = shard.take(whole)
        if not isinstance(parameter, DTensor):
            return whole
        shape, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return whole[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]
