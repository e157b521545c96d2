"""What a token costs, by formula: the FLOPs of each layer, of the head and of prediction."""

from nemotron.model.config import ModelConfig


def training_flops_per_token(config: ModelConfig, seq_len: int, num_mtp_depths: int) -> float:
    """Return the FLOPs of forward and backward for one token of a row of `seq_len` tokens.

    Backward counts twice the forward; recomputation is not counted. The causal half of attention
    is counted, and the scan with the published chunk length whatever the kernel uses.
    """
    forward = sum(layer_flops(config, letter, seq_len) for letter in config.hybrid_override_pattern)
    depths = num_mtp_depths * depth_flops(config, seq_len)
    return 3.0 * (forward + head_flops(config) + depths)


def layer_flops(config: ModelConfig, letter: str, seq_len: int) -> int:
    """Return the FLOPs of one layer's forward for one token of a row of `seq_len` tokens."""
    h = config.hidden_size
    if letter == "M":
        inner, groups, states = config.mamba_inner_size, config.n_groups, config.ssm_state_size
        projections = 2 * h * (2 * inner + 2 * groups * states + config.mamba_num_heads)
        projections += 2 * inner * h
        convolution = 2 * config.conv_kernel * config.conv_channels
        chunk = config.chunk_size
        scan = chunk * groups * states + chunk * inner + 4 * inner * states
        return projections + convolution + scan
    if letter == "*":
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        projections = 2 * h * config.head_dim * (2 * queries + 2 * keys)
        return projections + 2 * seq_len * queries * config.head_dim
    if letter == "-":
        return 4 * h * (config.intermediate_size or 0)
    flops = 2 * h * config.n_routed_experts
    flops += 4 * h * config.moe_shared_expert_intermediate_size
    if config.moe_latent_size is not None:
        flops += 4 * h * config.moe_latent_size
    width = config.expert_input_size
    return flops + 4 * config.num_experts_per_tok * width * config.moe_intermediate_size


def head_flops(config: ModelConfig) -> int:
    """Return the FLOPs of one token's logits; the lookup of its embedding counts nothing."""
    return 2 * config.hidden_size * config.vocab_size


def depth_flops(config: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs of one depth of multi-token prediction, forward, its logits included."""
    block = sum(layer_flops(config, letter, seq_len) for letter in config.mtp_pattern)
    return block + 4 * config.hidden_size**2 + head_flops(config)
