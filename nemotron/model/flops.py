"""Floating-point operations of the model's matrix products, from its configuration alone."""

from nemotron.model.config import ModelConfig


def forward_flops_per_token(config: ModelConfig, seq_len: int, mtp_depths: int = 0) -> float:
    """Return FLOPs of one token's forward pass in rows of `seq_len`; training costs three times it.

    The attention core counts the causal half, the scan its published chunk length, whatever
    chunk a kernel takes. Recomputed activations are not counted.
    """
    head = 2 * config.hidden_size * config.vocab_size
    layers = {letter: _layer(config, letter, seq_len) for letter in "M*E-"}
    trunk = sum(layers[letter] for letter in config.hybrid_override_pattern)
    join = 4 * config.hidden_size**2
    depth = join + sum(layers[letter] for letter in config.mtp_pattern) + head
    return trunk + head + mtp_depths * depth


def _layer(config: ModelConfig, letter: str, seq_len: int) -> float:
    hidden = config.hidden_size
    if letter == "M":
        inner, groups = config.mamba_inner_size, config.n_groups * config.ssm_state_size
        in_proj = 2 * hidden * (2 * inner + 2 * groups + config.mamba_num_heads)
        conv = 2 * config.conv_kernel * config.conv_channels
        chunk = config.chunk_size * (groups + inner)
        states = 4 * inner * config.ssm_state_size
        return in_proj + conv + chunk + states + 2 * inner * hidden
    if letter == "*":
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        return 2 * hidden * (2 * queries + 2 * keys) + 2 * seq_len * queries
    if letter == "E":
        router = 2 * hidden * config.n_routed_experts
        shared = 4 * hidden * config.moe_shared_expert_intermediate_size
        latent = 4 * hidden * config.moe_latent_size if config.moe_latent_size else 0
        width = config.expert_input_size * config.moe_intermediate_size
        return router + shared + latent + 4 * config.num_experts_per_tok * width
    return 4 * hidden * (config.intermediate_size or 0)
