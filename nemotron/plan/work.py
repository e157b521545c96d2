"""FLOPs of a token by number format, on top of the count by layer."""

from collections import defaultdict

from nemotron.model.config import ModelConfig
from nemotron.model.flops import training_flops_per_token
from nemotron.precision.config import PrecisionConfig
from nemotron.precision.policy import preset_at, resolve


def linear_flops(model: ModelConfig, depths: int) -> dict[str, float]:
    """Return forward and backward FLOPs for one token of every layer that a format can be given."""
    flops: dict[str, float] = {}
    for index, letter in enumerate(model.hybrid_override_pattern):
        for name, count in _linears(model, letter).items():
            flops[f"backbone.layers.{index}.mixer.{name}"] = 6.0 * count
    for index, letter in enumerate(model.mtp_pattern):
        for name, count in _linears(model, letter).items():
            flops[f"mtp.layers.{index}.mixer.{name}"] = 6.0 * count * depths
    return flops


def _linears(model: ModelConfig, letter: str) -> dict[str, int]:
    """Return the weights that one token meets in each linear layer of a mixer."""
    h = model.hidden_size
    if letter == "M":
        inner = model.mamba_inner_size
        return {
            "in_proj": h * (inner + model.conv_channels + model.mamba_num_heads),
            "out_proj": inner * h,
        }
    if letter == "*":
        queries = h * model.head_dim * model.num_attention_heads
        keys = h * model.head_dim * model.num_key_value_heads
        return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
    if letter == "-":
        width = h * (model.intermediate_size or 0)
        return {"up_proj": width, "down_proj": width}
    width, shared = model.expert_input_size, h * model.moe_shared_expert_intermediate_size
    counts = {
        "experts": 2 * model.num_experts_per_tok * width * model.moe_intermediate_size,
        "shared_experts.up_proj": shared,
        "shared_experts.down_proj": shared,
    }
    if model.moe_latent_size is not None:
        latent = h * model.moe_latent_size
        counts |= {"fc1_latent_proj": latent, "fc2_latent_proj": latent}
    return counts


def flops_by_format(
    model: ModelConfig, precision: PrecisionConfig, seq_len: int, depths: int, load: float = 1.0
) -> dict[str, float]:
    """Return a token's FLOPs by the peak that they are measured against, at the start of a run.

    `load` is the work of the rank with the busiest experts, as a multiple of the mean.
    Router, head, scan, convolution and attention itself are never quantized.

    Raises:
        UserError: when a rule of the recipe decides nothing.
    """
    linears = linear_flops(model, depths)
    total = training_flops_per_token(model, seq_len, depths)
    rest = "fp32" if precision.compute == "fp32" else "bf16"
    found: defaultdict[str, float] = defaultdict(float, {rest: total - sum(linears.values())})
    table = resolve(
        list(linears), len(model.hybrid_override_pattern), precision, preset_at(precision, 0)
    )
    for line in table:
        times = load if line.kind == "moe.experts" else 1.0
        found[_peak_of(line.format, rest)] += linears[line.module] * times
    return dict(found)


def _peak_of(number_format: str, unquantized: str) -> str:
    """Return which peak of the hardware a format of the recipe is measured against."""
    if number_format == "bf16":
        return unquantized
    return "fp4" if number_format == "nvfp4" else "fp8"
