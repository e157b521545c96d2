"""A model of two layers that writes text with the embedded tokenizer."""

from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM


def build_writer(vocab_size: int) -> HybridLM:
    """Return one Mamba-2 and one attention layer with initial weights, the same each time."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        hybrid_override_pattern="M*",
        mamba_num_heads=2,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = HybridLM(config)
    model.init_weights(5)
    return model
