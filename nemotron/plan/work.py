"""FLOPs of a token by number format, on top of the count by layer."""

from collections import defaultdict

from nemotron.model.config import ModelConfig
from nemotron.model.flops import linear_flops, training_flops_per_token
from nemotron.precision.config import PrecisionConfig
from nemotron.precision.policy import resolve


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
        list(linears), len(model.hybrid_override_pattern), precision, precision.preset_at(0)
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
