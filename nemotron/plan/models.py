"""Dimensions of the models whose throughput was published."""

from nemotron.model.config import ModelConfig

NANO = ModelConfig(
    vocab_size=131072,
    hidden_size=2688,
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    routed_scaling_factor=2.5,
)
"""Nemotron 3 Nano 30B-A3B, as recipes/nano/model.yaml."""
LIGHTNING = NANO.model_copy(
    update={"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
)
"""Nemotron 3.5 Lightning: Nano with multi-token prediction.

Source: NVIDIA-NeMo/Megatron-Bridge: recipes/nemotronh/h100/nemotron_3_nano.py.
"""
SUPER = ModelConfig(
    vocab_size=131072,
    hidden_size=4096,
    hybrid_override_pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
    "EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    mamba_num_heads=128,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=2688,
    moe_shared_expert_intermediate_size=5376,
    moe_latent_size=1024,
    routed_scaling_factor=5.0,
    num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E",
)
"""Nemotron 3 Super 120B-A12B, as recipes/super/model.yaml."""
ULTRA = ModelConfig(
    vocab_size=131072,
    hidden_size=8192,
    hybrid_override_pattern="MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*"
    "EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    mamba_num_heads=256,
    num_attention_heads=64,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=5120,
    moe_shared_expert_intermediate_size=10240,
    moe_latent_size=2048,
    routed_scaling_factor=5.0,
    num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E",
)
"""Nemotron 3 Ultra 550B-A55B.

Source: NVIDIA/Megatron-LM: examples/post_training/modelopt/conf/nvidia.
"""
MODELS = {"Nano": NANO, "Lightning": LIGHTNING, "Super": SUPER, "Ultra": ULTRA}
"""By the names of the published tables."""
