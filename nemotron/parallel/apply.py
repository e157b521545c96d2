"""The choice between one process, which holds a model alone, and a layout of ranks."""

from collections.abc import Callable

import torch

from nemotron.model.hybrid import HybridLM
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.local import LocalModel
from nemotron.parallel.mesh import Mesh


def distribute(
    build: Callable[[], HybridLM],
    mesh: Mesh | None,
    config: ParallelConfig,
    *,
    seq_len: int,
    num_depths: int,
    device: torch.device,
) -> LocalModel:
    """Return what this rank holds of a model; `build` makes it, whole, on the meta device.

    `seq_len` and `num_depths` (of multi-token prediction) give the cost of the layers, where stages
    share them.
    """
    if mesh is None:
        model = build()
        return LocalModel(model.config, [model])
    # FSDP2 and pipelines take seconds to import, which one process need not spend
    from nemotron.parallel.distributed import lay_out

    return lay_out(build, mesh, config, seq_len, num_depths, device)
