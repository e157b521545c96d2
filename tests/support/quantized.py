"""Scales of a model's layers as plain max calibration gives them, and a model that engines take."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nemotron.precision.formats import E4M3, to_fp8
from nemotron.precision.scales import LinearScales, StoredFormat
from nemotron.precision.stored import invertible_scale

Choose = Callable[[str], StoredFormat | None]

WIDTHS = {
    "hidden_size": 48,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "n_routed_experts": 3,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 64,
    "moe_latent_size": 32,
}
"""Sizes that are multiples of 16 where a layer's inputs are counted."""


def scales_of(
    weight: Tensor, format: StoredFormat, *, amax: float | None = None, inputs: float | None = 3.0
) -> LinearScales:
    """Return max-calibrated scales; `amax` is that of layers that are multiplied as one."""
    largest = weight.abs().amax() if amax is None else torch.tensor(amax)
    limit = 448.0 if format == "fp8" else 448.0 * 6.0
    given = None if inputs is None else invertible_scale(torch.tensor(inputs / limit))
    if format == "fp8":
        return LinearScales("fp8", largest / limit, None, given)
    outer = invertible_scale(largest / limit)
    blocks = weight.view(weight.shape[0], -1, 16).abs().amax(-1)
    scale = to_fp8((blocks / (6.0 * outer)).clamp(min=2.0**-9), E4M3)
    return LinearScales("nvfp4", scale, outer, given)


def scales_of_all(
    weights: Mapping[str, Tensor], choose: Choose, *, inputs: float | None = 3.0
) -> dict[str, LinearScales]:
    """Return scales of the layers that `choose` names a format for, by their names on disk."""
    found = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer == name or weight.ndim != 2 or (format := choose(layer)) is None:
            continue
        shared = None
        if layer.endswith((".q_proj", ".k_proj", ".v_proj")):
            mixer = layer.rpartition(".")[0]
            own = [weights[f"{mixer}.{p}_proj.weight"].abs().amax().item() for p in "qkv"]
            shared = max(own)
        found[layer] = scales_of(weight, format, amax=shared, inputs=inputs)
    return found
