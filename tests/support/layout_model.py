"""The model that the ranks share: all kinds of layers, in sizes that four ranks can share."""

MODEL = {
    "vocab_size": 4096,
    "hidden_size": 24,
    "hybrid_override_pattern": "ME*E",
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "n_groups": 4,
    "ssm_state_size": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "moe_latent_size": 12,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
}
