"""Which experts a token goes to, and the statistics that keep the experts balanced."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nemotron.model.config import ModelConfig
from nemotron.ops.linear import wide_linear
from nemotron.ops.router_step import router_step
from nemotron.ops.routing import balance_sums, choose, count, topk_routing


@dataclass(frozen=True)
class Routing:
    """What one call of a router decided.

    `scores` are sigmoid probabilities before the correction bias, `weights` (float32) belong to
    the chosen experts.
    """

    scores: Float[Tensor, "M E"]
    experts: Int[Tensor, "M K"]
    weights: Float[Tensor, "M K"]
    counts: Int[Tensor, " E"]
    """Tokens that each expert gets."""
    own: Int[Tensor, "M K"] | None = None
    """What the router chose by itself, where the experts were given."""


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
    language_loss_sum: Float[Tensor, ""] | None = None
    """Of the first mixture layer: cross entropy of the gate over languages, summed over the tokens
    whose language is known."""


@dataclass(frozen=True)
class GroupChoice:
    """The one group of experts that each token may use, decided outside of the routers."""

    group: Int[Tensor, " M"]
    factor: Float[Tensor, "M 1"] | None
    """What the chosen experts' weights are multiplied by; absent: nothing."""
    shares: Float[Tensor, "M G"]
    """Probability of each group."""


@dataclass(frozen=True)
class ExpertChoice:
    """The experts of each token as another pass chose them; -1 leaves a token to the router.

    The router weighs them by its scores of now, with gradients.
    Source: NVIDIA/Megatron-LM: megatron/core/transformer/moe/router_replay.py.
    """

    experts: Int[Tensor, "M K"]


Choice = GroupChoice | ExpertChoice
"""What is decided about a token's experts before its router is asked."""


@dataclass
class FirstRun:
    """What a router chose in the first run of a layer that is computed again for backward.

    The second run uses it: scores that differ in their last bits could send tokens to other ranks.
    """

    experts: Int[Tensor, "M K"] | None = None


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
        experts = config.language_experts
        self.group_names = () if experts is None else experts.languages
        """Names of the groups, where each is balanced by itself."""
        self.sum_over_row = self.own_tokens = None
        self.wide_linear, self.topk_routing = wide_linear, topk_routing
        self.balance_sums, self.router_step = balance_sums, router_step
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32)
        )

    def forward(
        self,
        x: Float[Tensor, "M D"],
        choice: Choice | None = None,
        first_run: FirstRun | None = None,
    ) -> Routing:
        """Choose experts, of the group that was chosen already if there is one, or weigh given."""
        logits = self.wide_linear(x, self.weight)  # never rounded to bfloat16
        given, own = self._given(logits.detach(), choice)
        if first_run is not None and first_run.experts is not None:
            given = first_run.experts
        weights, scores, experts, counts = self.topk_routing(
            logits,
            self.e_score_correction_bias,
            given,
            top_k=self.top_k,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            normalize=self.normalize,
            scaling=self.scaling,
        )
        if first_run is not None:
            first_run.experts = experts
        if isinstance(choice, GroupChoice) and choice.factor is not None:
            weights = weights * choice.factor
        return Routing(scores, experts, weights, counts, own)

    def _given(
        self, logits: Float[Tensor, "M E"], choice: Choice | None
    ) -> tuple[Int[Tensor, "M K"] | None, Int[Tensor, "M K"] | None]:
        """Return the experts that a choice leaves no doubt about, and the router's own beside."""
        if choice is None:
            return None, None
        biased = logits.sigmoid() + self.e_score_correction_bias
        if isinstance(choice, GroupChoice):
            return self._inside(biased, choice.group).topk(self.top_k, dim=-1).indices, None
        own = choose(biased, self.top_k, self.num_groups, self.top_groups)
        given = choice.experts.long()
        return torch.where(given < 0, own, given), own

    def _inside(
        self, scores: Float[Tensor, "M E"], group: Int[Tensor, " M"], outside: float = -math.inf
    ) -> Float[Tensor, "M E"]:
        """Return the scores of the experts of each token's group, and another value for others."""
        grouped = scores.unflatten(1, (self.num_groups, -1))
        number = torch.arange(self.num_groups, device=group.device)
        others = (number != group.unsqueeze(1)).unsqueeze(2)
        return grouped.masked_fill(others, outside).flatten(1)

    def statistics(
        self, routing: Routing, num_rows: int, name: str, padding: Bool[Tensor, "B T"] | None = None
    ) -> RoutingStats:
        """Compute the sequence-level balance loss, beside the tokens per expert.

        The loss looks at the unbiased top-k of scores normalized over all experts, not at the
        routing used: per row, E * sum_e f_e * P_e with f_e the share of the row's assignments and
        P_e its mean score (Switch Transformer, eq. 4; Megatron-LM's `seq_aux_loss`). Tokens that
        are `padding` belong to no row. Of named groups each has a loss of its own, over its
        experts and tokens.
        """
        if padding is not None and self.own_tokens is not None:
            padding = self.own_tokens(padding)
        scores, counts, num_groups = routing.scores, routing.counts, 1
        if self.group_names:
            num_groups = self.num_groups
            group = routing.experts[:, 0] // (self.num_experts // num_groups)
            scores = self._inside(scores, group, outside=0.0)
        if padding is not None:
            real = (~padding).flatten().long().repeat_interleave(self.top_k)
            counts = count(routing.experts.flatten(), self.num_experts, real)
        # per row, tokens x mean score = sum of scores
        shares, load = self.balance_sums(scores, padding, num_rows=num_rows, top_k=self.top_k)
        if self.sum_over_row is not None:
            load = self.sum_over_row(load)
        # top-k x tokens of the row; a row may consist of padding
        grouped = load.unflatten(1, (num_groups, -1))
        load = (grouped / grouped.sum(-1, keepdim=True).clamp(min=1)).flatten(1)
        aux_loss_sum = self.num_experts // num_groups * (load * shares).sum()
        return RoutingStats(name, counts, aux_loss_sum)

    @torch.no_grad()
    def update_bias(self, counts: Float[Tensor, " E"] | Int[Tensor, " E"], rate: float) -> None:
        """Move the bias of under-used experts up and of over-used ones down by `rate`.

        `counts` are the tokens of one whole optimizer step (aux-loss-free balancing, Wang et al.
        2024; Megatron-LM: moe_utils.py, get_updated_expert_bias). Named groups are balanced each by
        itself, so that a rare language keeps its experts.
        """
        counts = counts.to(self.e_score_correction_bias)
        mean = counts.mean()
        if self.group_names:
            grouped = counts.view(self.num_groups, -1)
            mean = grouped.mean(1, keepdim=True).expand_as(grouped).flatten()
        self.e_score_correction_bias += rate * torch.sign(mean - counts)


def routers(model: nn.Module) -> dict[str, Router]:
    """Return every router of a model by the name of its layer, as in `RoutingStats.name`."""
    named = model.named_modules()
    return {n.removesuffix(".mixer.gate"): m for n, m in named if isinstance(m, Router)}
