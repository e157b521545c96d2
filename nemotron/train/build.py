"""Building what this rank holds of a recipe's model."""

import torch

from nemotron.model.block import Block
from nemotron.model.config import LAYER_KINDS
from nemotron.model.hybrid import HybridLM
from nemotron.parallel.apply import LocalModel, distribute
from nemotron.parallel.mesh import Mesh
from nemotron.precision.apply import apply as apply_precision
from nemotron.train.config import PretrainConfig
from nemotron.train.loss import num_depths


def build_model(
    config: PretrainConfig, device: torch.device, mesh: Mesh | None = None
) -> LocalModel:
    """Build what this rank holds of the recipe's model, with fresh weights."""

    def build() -> HybridLM:
        # on meta first, so that no memory is spent on what other ranks hold
        with torch.device("meta"):
            model = HybridLM(config.model)
        apply_precision(model, config.precision)
        for block in model.modules():
            if isinstance(block, Block):
                block.recompute = config.recomputes(LAYER_KINDS[block.letter])
        return model

    local = distribute(
        build,
        mesh,
        config.parallel,
        seq_len=config.data.seq_len,
        num_depths=num_depths(config.model, config.loss),
        device=device,
    )
    local.materialise(device)
    local.init_weights(config.seed)
    return local
