"""Initial weights, as Megatron-LM draws them for hybrid models."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nemotron.model.candidates import mean_of
from nemotron.model.config import ModelConfig

STACKED = (".experts.up_proj", ".experts.down_proj")
"""Parameters that hold all experts of a layer; each expert is drawn by itself."""

RESIDUAL_OUTPUTS = (
    "mixer.out_proj.weight",
    "mixer.o_proj.weight",
    "mixer.down_proj.weight",
    "shared_experts.down_proj.weight",
    "experts.down_proj",
    "fc2_latent_proj.weight",
)
"""Projections that write into the residual stream: their spread shrinks with depth."""

ADDED = ("candidates.", "edit_heads.")
"""Prefixes of the parameters that text correction adds; a model to begin with may lack them."""


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter and buffer as `draw` says.

    Source: NVIDIA/Megatron-LM: megatron/core/transformer/transformer_config.py (output std is
    std / sqrt(layers) for hybrid models) and megatron/core/ssm/mamba_mixer.py.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.copy_(draw(name, tensor.shape, config, seed))


def draw(
    name: str,
    shape: torch.Size,
    config: ModelConfig,
    seed: int,
    experts: Sequence[int] | None = None,
) -> Tensor:
    """Return a whole tensor of the model, from a generator seeded by (seed, its name).

    Of a tensor that stacks experts, each has a generator of its own, so that `experts` alone can
    be drawn: a rank need not draw what others hold.
    """
    if not name.endswith(STACKED):
        return _draw(name, shape, config, generator(seed, name))
    numbers = range(shape[0]) if experts is None else experts
    result = torch.empty(len(numbers), *shape[1:])
    for row, expert in zip(result, numbers, strict=True):
        row.copy_(_draw(name, row.shape, config, generator(seed, f"{name}.{expert}")))
    return result


def generator(seed: int, name: str) -> torch.Generator:
    """Return the generator of a tensor's first values."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _draw(name: str, shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    if name == "candidates.weight":
        return mean_of(shape)
    if name == "language.linear":
        return torch.zeros(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log":
        return uniform(1.0, 16.0).log_()
    if leaf == "D":
        return torch.ones(shape)
    if leaf == "e_score_correction_bias":
        return torch.zeros(shape)
    if leaf == "dt_bias":
        step = uniform(math.log(config.time_step_min), math.log(config.time_step_max)).exp_()
        step.clamp_(min=config.time_step_floor)
        return step + torch.log(-torch.expm1(-step))  # inverse of softplus
    if ".conv1d." in name:
        bound = 1 / math.sqrt(config.conv_kernel)  # Kaiming uniform with a = sqrt(5)
        return uniform(-bound, bound)
    if len(shape) == 1:
        return torch.ones(shape)  # gains of norms
    std = config.initializer_range
    if name.endswith(RESIDUAL_OUTPUTS):
        std /= math.sqrt(len(config.hybrid_override_pattern))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
