"""Mixtures of experts for few tokens: only the experts that these chose are read."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nemotron.generate.module_copies import frozen, take_over
from nemotron.model.linear import MLP
from nemotron.model.moe import Experts, MoE
from nemotron.model.router import Choice, FirstRun, Router, Routing, RoutingStats

FEW_TOKENS = 8
"""Up to so many tokens pass their experts one by one; few experts are then read twice."""


class ChosenExperts(nn.Module):
    """Experts as tables whose rows are summed: reads those of a token's experts and no others.

    A product W x is the sum of the columns of W, each times an element of x: an embedding bag.
    `shared` is the expert that every token passes, as wide as one or several routed ones, when it
    reads the same input.
    """

    def __init__(self, experts: Experts, shared: MLP | None) -> None:
        super().__init__()
        width = experts.up_proj.shape[1]
        up, down = experts.up_proj.mT, experts.down_proj.mT  # [E, I, F], [E, F, I]
        num_experts = num_all = up.shape[0]
        if shared is not None:
            up = torch.cat([up, shared.up_proj.weight.unflatten(0, (-1, width)).mT])
            down = torch.cat([down, shared.down_proj.weight.T.unflatten(0, (-1, width))])
            num_all = up.shape[0]
        self.up, self.down = up.flatten(0, 1).contiguous(), down.flatten(0, 1).contiguous()
        self.up_rows = torch.arange(self.up.shape[0]).view(num_all, -1)
        self.down_rows = torch.arange(self.down.shape[0]).view(num_all, -1)
        self.always = torch.arange(num_experts, num_all)
        most = torch.arange(FEW_TOKENS * num_all)
        self.up_bags, self.down_bags = (
            most * part.shape[1] for part in (self.up_rows, self.down_rows)
        )
        # many tokens use the same memory
        for name, table in (("up_proj", self.up), ("down_proj", self.down)):
            parts = table.view(num_all, -1, table.shape[1])[:num_experts].mT
            setattr(experts, name, frozen(parts))

    def forward(self, x: Float[Tensor, "M I"], routing: Routing) -> Float[Tensor, "M I"]:
        experts: Int[Tensor, "M K"] = routing.experts
        weights = routing.weights
        if extra := self.always.shape[0]:
            experts = torch.cat([experts, self.always.expand(x.shape[0], -1)], dim=1)
            weights = F.pad(weights, (0, extra), value=1.0)
        chosen = experts.flatten()
        rows = x.repeat_interleave(experts.shape[1], dim=0)  # [M K, I]
        chosen_up = self.up_rows.index_select(0, chosen)
        hidden = _sum_rows(self.up, chosen_up, rows, self.up_bags)  # [M K, F]
        hidden = (hidden.relu_() * weights.view(-1, 1)).mul_(hidden).to(x.dtype)
        chosen_down = self.down_rows.index_select(0, chosen)
        rows = _sum_rows(self.down, chosen_down, hidden, self.down_bags)
        return rows.view(*experts.shape, -1).sum(1)


def _sum_rows(
    table: Float[Tensor, "R O"],
    rows: Int[Tensor, "bags I"],
    weights: Float[Tensor, "bags I"],
    bags: Int[Tensor, " most"],
) -> Float[Tensor, "bags O"]:
    """Sum the rows of each bag, times their weights; `bags` are the bags' beginnings, and more."""
    # as F.embedding_bag, which finds the beginnings anew each time
    begins = bags[: rows.shape[0]]
    return torch.embedding_bag(
        table, rows.flatten(), begins, False, 0, False, weights.flatten(), False
    )[0]


class FewTokensMoE(nn.Module):
    """A mixture that passes a few tokens one by one; computes more as in training."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        # the shared expert is one more routed one where its width allows that
        width = moe.experts.up_proj.shape[1]
        shared_width = moe.shared_experts.up_proj.weight.shape[0]
        self.includes_shared = moe.fc1_latent_proj is None and shared_width % width == 0
        self.experts = ChosenExperts(
            moe.experts, moe.shared_experts if self.includes_shared else None
        )

    def forward(
        self, x: Float[Tensor, "B T D"], choice: Choice | None = None
    ) -> Float[Tensor, "B T D"]:
        tokens, moe = x.flatten(0, 1), self.moe  # [M, D]
        if tokens.shape[0] > FEW_TOKENS:
            return moe(x, choice=choice)[0]
        routing = moe.gate(tokens, choice)
        latent = tokens if moe.fc1_latent_proj is None else moe.fc1_latent_proj(tokens)
        routed = self.experts(latent, routing)
        if moe.fc2_latent_proj is not None:
            routed = moe.fc2_latent_proj(routed)
        routed = routed.view_as(x)
        return routed if self.includes_shared else routed + moe.shared_experts(x)


class RouterStep(Router):
    """Routes few tokens by an operation of its own, others as in training."""

    def __init__(self, router: Router) -> None:
        take_over(self, router)

    def forward(
        self,
        x: Float[Tensor, "M D"],
        choice: Choice | None = None,
        first_run: FirstRun | None = None,
    ) -> Routing:
        """As `Router.forward`; of equal scores another expert may be chosen."""
        is_plain = choice is None and self.num_groups == 1 and not torch.is_grad_enabled()
        if not is_plain or not self.router_step.takes(x, (x.shape[0],)):
            return super().forward(x, choice, first_run)
        bias, top_k = self.e_score_correction_bias, self.top_k
        found = self.router_step(
            x, self.weight, bias, top_k, self.scaling, normalize=self.normalize
        )
        return Routing(*found)


class MoEStep(MoE):
    """Reads only the chosen experts if tokens are few; computes others as in training."""

    def __init__(self, moe: MoE) -> None:
        take_over(self, moe)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        stats_name: str | None = None,
        padding: Bool[Tensor, "B S"] | None = None,
        choice: Choice | None = None,
        first_run: FirstRun | None = None,
    ) -> tuple[Float[Tensor, "B T D"], RoutingStats | None]:
        """As `MoE.forward`."""
        tokens, experts = x.flatten(0, 1), self.experts
        copies = tokens.shape[0] * self.gate.top_k
        if (
            stats_name is not None
            or torch.is_grad_enabled()
            or not _is_plain(experts, x.dtype)
            or not experts.expert_step.takes(tokens, (copies,))
        ):
            return super().forward(x, stats_name, padding, choice, first_run)
        routing = self.gate(tokens, choice)
        given = routing.experts, routing.weights, experts.up_proj, experts.down_proj
        shared = self.shared_experts(tokens)
        if self.fc1_latent_proj is None or self.fc2_latent_proj is None:
            return experts.expert_step(tokens, *given, shared).view_as(x), None
        latent = experts.expert_step(self.fc1_latent_proj(tokens), *given)
        return (self.fc2_latent_proj(latent) + shared).view_as(x), None


def _is_plain(experts: Experts, dtype: torch.dtype) -> bool:
    """Whether the experts are all here, prepared for a dtype, and nothing is added to them."""
    others = experts.dispatcher, experts.number_copies, experts.up_adapter, experts.down_adapter
    return experts.up_proj.dtype == dtype and all(other is None for other in others)
