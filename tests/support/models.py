"""A small model with every kind of layer, in float64, no weight at a special value."""

from collections.abc import Collection

import torch
from torch import Tensor

from nemotron.model.block import Block
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import recompute as apply_recompute
from nemotron.ops.config import RECOMPUTED, Recomputed
from nemotron.ops.recompute import saving

VALUES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "hybrid_override_pattern": "ME*-M",
    "mamba_num_heads": 6,
    "mamba_head_dim": 5,
    "n_groups": 3,
    "ssm_state_size": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 10,
    "moe_shared_expert_intermediate_size": 14,
    "moe_latent_size": 9,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
}


def build_config(**changes: object) -> ModelConfig:
    return ModelConfig(**{k: v for k, v in (VALUES | changes).items() if v is not None})


def build(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> HybridLM:
    """Return a model whose weights are initial ones plus noise."""
    model = HybridLM(build_config(**changes))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    model.compute_dtype = dtype
    return model.to(dtype)


def recompute(model: HybridLM, again: bool) -> None:
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = again


def recompute_operations(
    model: HybridLM, names: Collection[Recomputed] = tuple(RECOMPUTED)
) -> None:
    """Let the blocks that are not computed again do so with the results of operations."""
    for module in model.modules():
        if isinstance(module, Block) and not module.recompute:
            apply_recompute(module, names)
            module.saving = saving


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VALUES["vocab_size"], (rows, length), generator=generator)


def gradients(model: HybridLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
