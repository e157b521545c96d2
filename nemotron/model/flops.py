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
    products = 2 * sum(linear_weights(config, letter).values())
    if letter == "M":
        inner, groups, states = config.mamba_inner_size, config.n_groups, config.ssm_state_size
        convolution = 2 * config.conv_kernel * config.conv_channels
        chunk = config.chunk_size
        scan = chunk * groups * states + chunk * inner + 4 * inner * states
        return products + convolution + scan
    if letter == "*":
        return products + 2 * seq_len * config.num_attention_heads * config.head_dim
    if letter == "-":
        return products
    return products + 2 * config.hidden_size * config.n_routed_experts  # the router's


def head_flops(config: ModelConfig) -> int:
    """Return the FLOPs of one token's logits; the lookup of its embedding counts nothing."""
    return 2 * config.hidden_size * config.vocab_size


def depth_flops(config: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs of one depth of multi-token prediction, forward, its logits included."""
    block = sum(layer_flops(config, letter, seq_len) for letter in config.mtp_pattern)
    return block + 4 * config.hidden_size**2 + head_flops(config)


def linear_flops(config: ModelConfig, num_mtp_depths: int) -> dict[str, float]:
    """Return forward and backward FLOPs for one token of every layer that a format can be given."""
    flops: dict[str, float] = {}
    for index, letter in enumerate(config.hybrid_override_pattern):
        for name, count in linear_weights(config, letter).items():
            flops[f"backbone.layers.{index}.mixer.{name}"] = 6.0 * count
    for index, letter in enumerate(config.mtp_pattern):
        for name, count in linear_weights(config, letter).items():
            flops[f"mtp.layers.{index}.mixer.{name}"] = 6.0 * count * num_mtp_depths
    return flops


def linear_weights(config: ModelConfig, letter: str) -> dict[str, int]:
    """Return the weights that one token meets in each linear layer of a mixer."""
    h = config.hidden_size
    if letter == "M":
        inner = config.mamba_inner_size
        return {
            "in_proj": h * (inner + config.conv_channels + config.mamba_num_heads),
            "out_proj": inner * h,
        }
    if letter == "*":
        queries = h * config.head_dim * config.num_attention_heads
        keys = h * config.head_dim * config.num_key_value_heads
        return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
    if letter == "-":
        width = h * (config.intermediate_size or 0)
        return {"up_proj": width, "down_proj": width}
    width, shared = config.expert_input_size, h * config.moe_shared_expert_intermediate_size
    counts = {
        "experts": 2 * config.num_experts_per_tok * width * config.moe_intermediate_size,
        "shared_experts.up_proj": shared,
        "shared_experts.down_proj": shared,
    }
    if config.moe_latent_size is not None:
        latent = h * config.moe_latent_size
        counts |= {"fc1_latent_proj": latent, "fc2_latent_proj": latent}
    return counts
