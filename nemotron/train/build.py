"""The model of a run as this rank holds it: built, laid out, with fresh weights."""

import torch

from nemotron.model.block import Block
from nemotron.model.build import build_on_meta
from nemotron.model.config import LAYER_KINDS
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import apply as apply_ops
from nemotron.ops.apply import recompute
from nemotron.ops.recompute import saving
from nemotron.parallel.apply import distribute
from nemotron.parallel.dims import resolve_dims
from nemotron.parallel.local import LocalModel
from nemotron.parallel.mesh import Mesh
from nemotron.parallel.runtime import Ranks
from nemotron.precision.apply import apply as apply_precision
from nemotron.train.config import RunConfig
from nemotron.train.tuning import apply_tuning


def build_local(config: RunConfig, device: torch.device, ranks: Ranks) -> LocalModel:
    """Seed this process, lay the ranks out, and build what this one holds of the model."""
    torch.manual_seed(config.seed)
    dims = resolve_dims(config.parallel, ranks.world)
    mesh = Mesh(dims, device.type) if ranks.grouped else None
    return build_model(config, device, mesh)


def build_model(config: RunConfig, device: torch.device, mesh: Mesh | None = None) -> LocalModel:
    """Build what this rank holds of the recipe's model, with fresh weights."""

    def build() -> HybridLM:
        # on meta first, so that no memory is spent on what other ranks hold
        model = build_on_meta(config.model)
        apply_ops(model, config.ops)
        apply_precision(model, config.precision)
        apply_tuning(model, config.tuning)
        for block in model.modules():
            if isinstance(block, Block):
                block.recompute = config.recomputes(LAYER_KINDS[block.letter])
                if config.recomputed_operations and not block.recompute:
                    recompute(block, config.recomputed_operations)
                    block.saving = saving
        return model

    local = distribute(
        build,
        mesh,
        config.parallel,
        seq_len=config.data.seq_len,
        num_depths=config.num_depths,
        device=device,
    )
    local.materialize(device)
    local.init_weights(config.seed)
    return local
