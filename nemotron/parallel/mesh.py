"""The only place that makes process groups: every axis of the mesh, in four views of the ranks."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemotron.parallel.dims import ParallelDims


class Mesh:
    """Groups of this rank, by axis.

    Ranks are numbered with `tp` fastest, then cp, dp_shard, dp_replicate and pp. Weights outside
    experts are sharded over `fsdp` = dp_shard x cp; experts are cut out of dp_shard x cp x tp into
    `ep` neighbors and sharded over the `efsdp` others.
    Source: pytorch/torchtitan: torchtitan/distributed/parallel_dims.py.
    """

    def __init__(self, dims: ParallelDims, device_type: str) -> None:
        """Make the groups; every rank does, in the same order."""
        self.dims = dims
        batch, row = dims.batch, dims.cp * dims.tp
        views = [
            ({"pp": dims.pp, "batch": batch, "cp": dims.cp, "tp": dims.tp}),
            ({"pp": dims.pp, "batch": batch, "row": row}),
            ({"pp": dims.pp, "dp_replicate": dims.dp_replicate, "fsdp": dims.fsdp, "tp": dims.tp}),
            (
                {
                    "pp": dims.pp,
                    "dp_replicate": dims.dp_replicate,
                    "efsdp": dims.efsdp,
                    "ep": dims.ep,
                }
            ),
        ]
        self._meshes = [
            init_device_mesh(device_type, tuple(view.values()), mesh_dim_names=tuple(view))
            for view in views
        ]
        _, _, dense, sparse = self._meshes
        names = ("dp_replicate",) if dims.dp_replicate > 1 else ()
        self.fsdp: DeviceMesh = dense[(*names, "fsdp")]
        """Where weights outside experts are sharded, and copied along dp_replicate."""
        self.efsdp: DeviceMesh = sparse[(*names, "efsdp")]
        """The same for experts."""
        self.ends: dist.ProcessGroup | None = None
        """This rank's counterparts on the first and the last stage, if it is on one of them."""
        if dims.pp > 1:
            stage = dims.world // dims.pp
            ends = [[rank, rank + dims.world - stage] for rank in range(stage)]
            own, _ = dist.new_subgroups_by_enumeration(ends)
            self.ends = own

    def describe(self) -> str:
        """Return the sizes of all axes that have more than one rank."""
        sizes = {name: size for name, size in vars(self.dims).items() if size > 1}
        axes = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return f"{self.dims.world} ({axes or 'fully sharded on one'})"

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return this rank's group along an axis: pp, batch, row (cp x tp), cp, tp, ep, …"""
        return self._mesh(axis).get_group(axis)

    def rank(self, axis: str) -> int:
        """Return the place of this rank along an axis."""
        return self._mesh(axis).get_local_rank(axis)

    def _mesh(self, axis: str) -> DeviceMesh:
        return next(m for m in self._meshes if axis in (m.mesh_dim_names or ()))
