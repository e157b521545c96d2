"""Which experts a token goes to, and the statistics that keep the experts balanced."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nemotron.model.config import ModelConfig
from nemotron.ops.linear import wide_linear


@dataclass(frozen=True)
class Routing:
    """What one call of a router decided.

    `scores` are sigmoid probabilities before the correction bias, `weights` (float32) belong to
    the chosen experts.
    """

    scores: Float[Tensor, "M E"]
    experts: Int[Tensor, "M K"]
    weights: Float[Tensor, "M K"]

    @functools.cached_property
    def counts(self) -> Int[Tensor, " E"]:
        """Tokens that each expert gets."""
        return count(self.experts.flatten(), self.scores.shape[1])


def count(
    numbers: Int[Tensor, " N"], size: int, weights: Int[Tensor, " N"] | None = None
) -> Int[Tensor, " size"]:
    """Return how often each number below `size` is there; unlike `bincount`, without a wait."""
    counts = torch.zeros(size, dtype=torch.int64, device=numbers.device)
    return counts.scatter_add_(0, numbers, torch.ones_like(numbers) if weights is None else weights)


@dataclass(frozen=True)
class RoutingStats:
    """Load of one router in one call: tokens per expert and the balance loss, summed over tokens.

    Tokens outside of all documents count nowhere.

    `aux_loss_sum` is the sum over rows of (tokens of the row) x (balance loss of the row), without
    coefficient; it carries gradients, `counts` does not.
    """

    name: str
    counts: Int[Tensor, " E"]
    aux_loss_sum: Float[Tensor, ""]


class Router(nn.Module):
    """Sigmoid router in float32: the bias chooses, the unbiased score weighs.

    Source: NVIDIA/Megatron-LM: megatron/core/transformer/moe/router.py.
    """

    sum_over_row: Callable[[Float[Tensor, "B E"]], Float[Tensor, "B E"]] | None
    """Adds up the load over the ranks that share the tokens of a row; absent: there are none."""
    own_tokens: Callable[[Bool[Tensor, "B T"]], Bool[Tensor, "B Tl"]] | None
    """Picks what this rank routes from a mask over a row's tokens; absent: all of them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.num_groups, self.top_groups = config.n_group, config.topk_group
        self.normalize = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.sum_over_row = self.own_tokens = None
        self.wide_linear = wide_linear
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32)
        )

    def forward(self, x: Float[Tensor, "M D"]) -> Routing:
        scores = self.wide_linear(x, self.weight).sigmoid()  # never rounded to bfloat16
        experts = self._choose(scores.detach() + self.e_score_correction_bias)
        weights = scores.gather(1, experts)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(scores, experts, weights * self.scaling)

    def _choose(self, biased: Float[Tensor, "M E"]) -> Int[Tensor, "M K"]:
        if self.num_groups > 1:
            # a group's score is the sum of its best top_k / top_groups experts
            grouped = biased.unflatten(1, (self.num_groups, -1))  # [M, groups, E / groups]
            best = grouped.topk(self.top_k // self.top_groups, dim=-1).values.sum(-1)
            allowed = torch.zeros_like(best, dtype=torch.bool)
            allowed.scatter_(1, best.topk(self.top_groups, dim=-1).indices, True)
            biased = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        return biased.topk(self.top_k, dim=-1).indices

    def statistics(
        self, routing: Routing, num_rows: int, name: str, padding: Bool[Tensor, "B T"] | None = None
    ) -> RoutingStats:
        """Compute the sequence-level balance loss, beside the tokens per expert.

        The loss looks at the unbiased top-k of scores normalized over all experts, not at the
        routing used: per row, E * sum_e f_e * P_e with f_e the share of the row's assignments and
        P_e its mean score (Switch Transformer, eq. 4; Megatron-LM's `seq_aux_loss`). Tokens that
        are `padding` belong to no row.
        """
        if padding is not None and self.own_tokens is not None:
            padding = self.own_tokens(padding)
        share = routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20)
        share = share.unflatten(0, (num_rows, -1))  # [B, T, E]
        counts = routing.counts
        if padding is not None:
            share = share.masked_fill(padding.unsqueeze(-1), 0)
            real = (~padding).flatten().long().repeat_interleave(self.top_k)
            counts = count(routing.experts.flatten(), self.num_experts, real)
        with torch.no_grad():
            chosen = share.topk(self.top_k, dim=-1).indices.flatten(1)  # [B, T * K]
            load = torch.zeros_like(share[:, 0])
            ones = torch.ones_like(chosen, dtype=load.dtype)
            if padding is not None:
                ones = ones.masked_fill_(padding.repeat_interleave(self.top_k, dim=1), 0)
            load.scatter_add_(1, chosen, ones)
            if self.sum_over_row is not None:
                load = self.sum_over_row(load)
            # top-k x tokens of the row; a row may be nothing but padding
            load /= load.sum(-1, keepdim=True).clamp(min=1)
        # per row, tokens x mean score = sum of scores
        aux_loss_sum = self.num_experts * (load * share.sum(1)).sum()
        return RoutingStats(name, counts, aux_loss_sum)

    @torch.no_grad()
    def update_bias(self, counts: Float[Tensor, " E"] | Int[Tensor, " E"], rate: float) -> None:
        """Move the bias of under-used experts up and of over-used ones down by `rate`.

        `counts` are the tokens of one whole optimizer step (aux-loss-free balancing, Wang et al.
        2024; Megatron-LM: moe_utils.py, get_updated_expert_bias).
        """
        counts = counts.to(self.e_score_correction_bias)
        self.e_score_correction_bias += rate * torch.sign(counts.mean() - counts)


def routers(model: nn.Module) -> dict[str, Router]:
    """Return every router of a model by the name of its layer, as in `RoutingStats.name`."""
    named = model.named_modules()
    return {n.removesuffix(".mixer.gate"): m for n, m in named if isinstance(m, Router)}
