"""FLOPs and parameters of the published models, which we did not choose."""

import pytest

from nemotron.model.config import ModelConfig
from nemotron.model.flops import training_flops_per_token
from nemotron.model.parameters import count_parameters

NANO = ModelConfig(
    vocab_size=131072,
    hidden_size=2688,
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    routed_scaling_factor=2.5,
)
SUPER = ModelConfig(
    vocab_size=131072,
    hidden_size=4096,
    hybrid_override_pattern="M" * 40 + "E" * 40 + "*" * 8,
    mamba_num_heads=128,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=2688,
    moe_shared_expert_intermediate_size=5376,
    moe_latent_size=1024,
    num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E",
)


@pytest.mark.parametrize(("config", "depths", "gigaflops"), [(NANO, 0, 20.8), (SUPER, 2, 85.4)])
def test_flops_per_token_of_the_published_models(config, depths, gigaflops):
    # the published figures have three digits
    assert training_flops_per_token(config, 8192, depths) / 1e9 == pytest.approx(
        gigaflops, abs=0.05
    )


@pytest.mark.parametrize(
    ("config", "total", "active", "mtp"),
    [(NANO, 31.578, 3.580, 0.0), (SUPER, 120.67, 12.77, 2.943)],
)
def test_parameters_of_the_published_models(config, total, active, mtp):
    count = count_parameters(config)
    assert count.total / 1e9 == pytest.approx(total, abs=0.005)
    assert count.active / 1e9 == pytest.approx(active, abs=0.005)
    assert count.mtp / 1e9 == pytest.approx(mtp, abs=0.005)


def test_attention_is_the_only_cost_that_grows_with_the_row():
    more = training_flops_per_token(NANO, 8193, 0) - training_flops_per_token(NANO, 8192, 0)
    assert more == 3 * 6 * 2 * 32 * 128
