"""A small model with every layer kind and no parameter left at a special value.

Sizes are odd, or such that some numbers fill vectors of sixteen and some are left over.
"""

import pytest
import torch

from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM

VOCAB = 61


def build_model(latent: int | None = None, width: int = 12) -> HybridLM:
    """Return a model with experts of this width whose every parameter and buffer is perturbed."""
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        hybrid_override_pattern="M*EM-E*M" if latent is None else "M*EM-E*E",
        mamba_num_heads=6,
        mamba_head_dim=4 if latent is None else 18,
        n_groups=3,
        ssm_state_size=5 if latent is None else 32,
        num_attention_heads=4 if latent is None else 10,
        num_key_value_heads=2,
        head_dim=8 if latent is None else 48,
        intermediate_size=40,
        n_routed_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=width,
        moe_shared_expert_intermediate_size=20,
        moe_latent_size=latent,
        routed_scaling_factor=1.7,
        num_nextn_predict_layers=1,
        mtp_hybrid_override_pattern="*E",
    )
    model = HybridLM(config)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.fixture(scope="session", params=[None, 10], ids=["experts", "latent experts"])
def model(request: pytest.FixtureRequest) -> HybridLM:
    """Both kinds of expert layers; tests must not change it."""
    return build_model(request.param)
