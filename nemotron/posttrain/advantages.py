"""How much better each answer was than the others to the same prompt."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.posttrain.config import AdvantageConfig

EPSILON = 1e-6
"""Added to the divisor, as NVIDIA-NeMo/RL: nemo_rl/algorithms/advantage_estimator.py does."""


def advantages(
    rewards: Float[Tensor, "P G"], lengths: Float[Tensor, "P G"], config: AdvantageConfig
) -> Float[Tensor, "P G"]:
    """Return one advantage an answer, from the rewards of `G` answers to each of `P` prompts.

    `(reward - baseline) / (scale + 1e-6)`, and `reward - baseline` where the scale is 0: an only
    success among failures keeps its size under `scale: loo`, since the others do not differ.
    `lengths` are the answers' tokens that count, which weigh them under `scale: batch`.

    Source: NVIDIA-NeMo/RL: nemo_rl/algorithms/utils.py, calculate_baseline_and_std_per_prompt.
    """
    centered = rewards - _baseline(rewards, config.baseline)
    if config.scale == "batch":
        scaled = _whiten(centered, lengths)
    else:
        scale = _scale(rewards, config.scale)
        scaled = torch.where(scale > 0, centered / (scale + EPSILON), centered)
    return scaled if config.clamp is None else scaled.clamp(-config.clamp, config.clamp)


def _baseline(rewards: Tensor, kind: str) -> Tensor:
    if kind == "none":
        return torch.zeros_like(rewards)
    total, size = rewards.sum(1, keepdim=True), rewards.shape[1]
    if kind == "group":
        return (total / size).expand_as(rewards)
    return (total - rewards) / max(size - 1, 1)


def _scale(rewards: Tensor, kind: str) -> Tensor:
    """Return what each answer's reward is divided by; 0: it is not."""
    if kind == "none":
        return torch.zeros_like(rewards)
    size = rewards.shape[1]
    if kind == "mean":
        return rewards.mean(1, keepdim=True).expand_as(rewards)
    if kind == "group":
        return _deviation(rewards).unsqueeze(1).expand_as(rewards)
    # one copy of the group for each answer, without that answer
    others = rewards.unsqueeze(1).expand(-1, size, -1)
    is_other = ~torch.eye(size, dtype=torch.bool, device=rewards.device)
    return _deviation(others[:, is_other].unflatten(1, (size, size - 1)))


def _deviation(values: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch"]:
    """Return the sample standard deviation over the last dimension; 0 of fewer than two values."""
    if values.shape[-1] < 2:
        return values.new_zeros(values.shape[:-1])
    return values.std(-1, correction=1)


def _whiten(values: Tensor, weights: Tensor) -> Tensor:
    """Take out the weighted mean and divide by the weighted deviation (REINFORCE++)."""
    total = weights.sum().clamp(min=1)
    mean = (values * weights).sum() / total
    variance = ((values - mean).square() * weights).sum() / total
    return (values - mean) * variance.clamp(min=1e-8).rsqrt()
