"""FLOPs per token against the published figures of the real sizes."""

import pytest

from nemotron.model.config import ModelConfig
from nemotron.model.flops import forward_flops_per_token


def test_super_agrees_with_the_flops_that_published_throughputs_imply() -> None:
    # 84.3 … 84.7 GFLOP per token trained, from published TFLOP/s over tokens/s at 8192 tokens a
    # row with two prediction depths
    pattern = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
    config = ModelConfig(
        vocab_size=131072,
        hidden_size=4096,
        hybrid_override_pattern=pattern,
        mamba_num_heads=128,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_intermediate_size=2688,
        moe_shared_expert_intermediate_size=5376,
        moe_latent_size=1024,
        num_nextn_predict_layers=1,
        mtp_hybrid_override_pattern="*E",
    )
    assert (pattern.count("M"), pattern.count("*"), pattern.count("E")) == (40, 8, 40)
    trained = 3 * forward_flops_per_token(config, 8192, mtp_depths=2)
    assert trained == pytest.approx(84.6e9, rel=0.02)
