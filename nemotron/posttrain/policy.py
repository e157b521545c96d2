"""The policy losses of the GRPO family: one number a token, from log-probabilities."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nemotron.posttrain.config import CorrectionConfig, PolicyConfig


@dataclass(frozen=True)
class Answers:
    """Which positions of some rows belong to the same answer.

    `number[b, t]` is the answer of a position, below `count`; positions outside `mask` count for
    nothing.
    """

    number: Int[Tensor, "B T"]
    count: int
    mask: Bool[Tensor, "B T"]

    def mean(self, values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return, at every position, the mean over the counted positions of its answer."""
        index = self.number.flatten()
        counted = torch.where(self.mask, values, 0).flatten()
        sums = values.new_zeros(self.count).index_add(0, index, counted)
        sizes = values.new_zeros(self.count)
        sizes = sizes.index_add(0, index, self.mask.flatten().to(values.dtype))
        return (sums / sizes.clamp(min=1))[index].view_as(values)

    def sum(self, values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return, at every position, the sum over the counted positions of its answer."""
        index = self.number.flatten()
        counted = torch.where(self.mask, values, 0).flatten()
        return values.new_zeros(self.count).index_add(0, index, counted)[index].view_as(values)


def policy_loss(
    logprobs: Float[Tensor, "B T"],
    old: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    answers: Answers,
    config: PolicyConfig,
) -> Float[Tensor, "B T"]:
    """Return the loss of each token, with gradients, before the correction for the rollout policy.

    `logprobs` are the live policy's, `old` those of the weights before the rollout batch's first
    update. Positions outside the answers have loss 0.

    Source: NVIDIA-NeMo/RL: nemo_rl/algorithms/loss/loss_functions.py, ClippedPGLossFn.
    """
    if config.kind == "reinforce":
        return torch.where(answers.mask, -advantages * logprobs, 0)
    # unlike `logprobs - old` it keeps 0 outside the answers, where both are 0
    difference = logprobs - (logprobs.detach() if config.on_policy else old)
    if config.kind == "gspo":
        difference = answers.mean(difference)
    ratio = difference.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.kind == "cispo":
        return torch.where(answers.mask, -advantages * clipped.detach() * logprobs, 0)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if config.dual_clip is not None:
        limit = -advantages * config.dual_clip
        loss = torch.where(advantages < 0, torch.minimum(loss, limit), loss)
    return torch.where(answers.mask, loss, 0)


def correction(
    old: Float[Tensor, "B T"],
    sampled: Float[Tensor, "B T"],
    answers: Answers,
    config: CorrectionConfig,
    *,
    whole_answers: bool = False,
) -> Float[Tensor, "B T"]:
    """Return the weight of each token: its probability for the trainer over that when sampled.

    `whole_answers` weighs an answer as a whole, by the product over its tokens, as GSPO does. What
    is not finite weighs 0.

    Source: NVIDIA-NeMo/RL: nemo_rl/algorithms/loss/loss_functions.py.
    """
    if config.kind == "none":
        return torch.ones_like(old)
    difference = (old - sampled).detach()
    weight = (answers.sum(difference) if whole_answers else difference).exp()
    weight = torch.nan_to_num(weight, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = config.min or 0.0, float("inf") if config.max is None else config.max
    if config.kind == "tis":
        return weight.clamp(low, high)
    if config.kind == "icepop":
        return torch.where((weight >= low) & (weight <= high), weight, 0)
    if config.kind == "seq-mask-tis":
        mean = answers.mean(difference).exp()
        return torch.where((mean >= low) & (mean <= high), weight, 0)
    return weight


def sequence_error(
    old: Float[Tensor, "B T"], sampled: Float[Tensor, "B T"], answers: Answers
) -> Float[Tensor, "B T"]:
    """Return, at every position, the mean `exp |log trainer - log sampled|` of its answer.

    1 is perfect agreement; NeMo RL calls its mean over a batch `token_mult_prob_error`.
    """
    return answers.mean((old - sampled).abs().exp())


def kl_divergence(
    logprobs: Float[Tensor, "B T"], reference: Float[Tensor, "B T"], kind: str
) -> Float[Tensor, "B T"]:
    """Estimate the divergence of the live policy from a reference, from the sampled tokens.

    Source: Schulman 2020, "Approximating KL Divergence"; log-ratios are limited to ±20 and the
    result to ±10 as in NVIDIA-NeMo/RL: nemo_rl/algorithms/utils.py, calculate_kl.
    """
    log_ratio = (reference - logprobs).clamp(-20, 20)
    if kind == "k1":
        value = -log_ratio
    elif kind == "k2":
        value = log_ratio.square() / 2
    else:
        value = log_ratio.exp() - 1 - log_ratio
    return value.clamp(-10, 10)
