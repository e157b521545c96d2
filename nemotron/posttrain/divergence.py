"""Divergence of two distributions over the vocabulary, from their logits."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.posttrain.sft_config import DistillationConfig


def divergence(
    student: Float[Tensor, "M V"], teacher: Float[Tensor, "M V"], config: DistillationConfig
) -> Float[Tensor, " M"]:
    """Return the divergence at each row in nats, times the squared temperature.

    The gradient then has the same size at any temperature. Source: Hinton et al. 2015, "Distilling
    the Knowledge in a Neural Network", section 2.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    ours = (student.to(wide) / config.temperature).log_softmax(-1)
    theirs = (teacher.to(wide) / config.temperature).log_softmax(-1)
    if config.top_k is not None:
        top = theirs.topk(config.top_k, dim=-1)
        ours, theirs = _with_rest(ours.gather(-1, top.indices)), _with_rest(top.values)
    first, second = (theirs, ours) if config.kind == "forward" else (ours, theirs)
    return config.temperature**2 * (first.exp() * (first - second)).sum(-1)


def _with_rest(logprobs: Float[Tensor, "M K"]) -> Float[Tensor, "M K1"]:
    """Add the probability of all other tokens together as one more."""
    tiny = torch.finfo(logprobs.dtype).tiny
    rest = -torch.expm1(logprobs.logsumexp(-1, keepdim=True).clamp(max=-1e-7))
    return torch.cat([logprobs, rest.clamp(min=tiny).log()], dim=-1)
