"""What a model has and what a token costs: parameters and FLOPs."""

from dataclasses import dataclass

from torch import nn

from nemotron.model.config import ModelConfig
from nemotron.model.flops import training_flops_per_token as training_flops_per_token


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; the multi-token-prediction block is counted apart."""

    total: int
    active: int
    """Those that one token meets: of the routed experts only the chosen ones."""
    mtp: int


def count_parameters(model: nn.Module, config: ModelConfig) -> ParameterCount:
    """Count the parameters of a model, which may lie on the meta device."""
    total = experts = mtp = 0
    for name, parameter in model.named_parameters():
        if name.startswith("mtp."):
            mtp += parameter.numel()
            continue
        total += parameter.numel()
        if ".mixer.experts." in name:
            experts += parameter.numel()
    idle = experts * (config.n_routed_experts - config.num_experts_per_tok)
    return ParameterCount(total, total - idle // config.n_routed_experts, mtp)
