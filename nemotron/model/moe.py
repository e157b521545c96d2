"""Mixture of experts: routed experts in full width or in a latent, beside one shared expert."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron.model.config import ModelConfig
from nemotron.model.linear import Linear
from nemotron.model.mlp import MLP, squared_relu
from nemotron.model.router import Router, Routing, RoutingStats
from nemotron.ops.grouped_linear import grouped_linear, row_multiple


class MoE(nn.Module):
    """Routed squared-ReLU experts plus a shared one that sees every token in full width.

    With `moe_latent_size` the routed experts read and write a narrower latent (LatentMoE): the
    router, the shared expert and both projections' outer side stay in full width.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(
            config.n_routed_experts, config.expert_input_size, config.moe_intermediate_size
        )
        self.shared_experts = MLP(config.hidden_size, config.moe_shared_expert_intermediate_size)
        self.fc1_latent_proj = self.fc2_latent_proj = None
        if config.moe_latent_size is not None:
            self.fc1_latent_proj = Linear(config.hidden_size, config.moe_latent_size)
            self.fc2_latent_proj = Linear(config.moe_latent_size, config.hidden_size)

    def forward(
        self, x: Float[Tensor, "B T D"], stats_name: str | None = None
    ) -> tuple[Float[Tensor, "B T D"], RoutingStats | None]:
        """Return the layer's output and, when `stats_name` is given, the router's statistics."""
        tokens = x.flatten(0, 1)  # [M, D]
        routing = self.gate(tokens)
        latent = tokens if self.fc1_latent_proj is None else self.fc1_latent_proj(tokens)
        routed = self.experts(latent, routing)
        if self.fc2_latent_proj is not None:
            routed = self.fc2_latent_proj(routed)
        stats = None
        if stats_name is not None:
            stats = self.gate.statistics(routing, num_rows=x.shape[0], name=stats_name)
        return routed.view_as(x) + self.shared_experts(x), stats


class Experts(nn.Module):
    """All routed experts as two stacked matrices; every token reaches its K experts, none drops."""

    def __init__(self, num_experts: int, input_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, input_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, input_size, intermediate_size))

    def forward(self, x: Float[Tensor, "M I"], routing: Routing) -> Float[Tensor, "M I"]:
        """Send each token to its experts and add up what they return, weighted."""
        token, place, counts = _arrange(routing, row_multiple(x))
        rows = _Dispatch.apply(x, token, place)  # [R, I]
        # rows that only fill up an expert's share weigh nothing, so they change no gradient
        weights = routing.weights.new_zeros(token.shape[0])
        weights = weights.scatter(0, place.flatten(), routing.weights.flatten())
        hidden = self.multiply(rows, self.up_proj, counts)
        # weights before the down projection, as Megatron-LM does in training
        hidden = squared_relu(hidden, weights.unsqueeze(-1))
        rows = self.multiply(hidden, self.down_proj, counts)
        return _Combine.apply(rows, token, place)

    def multiply(
        self, rows: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
    ) -> Float[Tensor, "R N"]:
        """Multiply each expert's rows by its matrix, cast to the dtype of the rows."""
        return grouped_linear(rows, weight.to(rows.dtype), counts)


def _arrange(
    routing: Routing, multiple: int
) -> tuple[Int[Tensor, " R"], Int[Tensor, "M K"], Int[Tensor, " E"]]:
    """Line up the copies of all tokens by expert, each expert's share rounded up to `multiple`.

    Returns the token in each row (token 0 where a row only fills up), the row of each token's
    copies, and the rows of each expert.
    """
    experts = routing.experts.flatten()
    order = experts.argsort(stable=True)
    row = torch.arange(order.shape[0], device=order.device)
    counts, total = routing.counts, order.shape[0]
    if multiple > 1:
        counts = (counts + multiple - 1) // multiple * multiple
        filled = (counts - routing.counts).cumsum(0) - (counts - routing.counts)
        row = row + filled[experts[order]]
        total = int(counts.sum())
    token = order.new_zeros(total)
    token[row] = order // routing.experts.shape[1]
    place = torch.empty_like(order)
    place[order] = row
    return token, place.view_as(routing.experts), counts


class _Dispatch(torch.autograd.Function):
    """Copy each token to its experts' rows; the gradient is the adjoint, without atomic adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x[token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return _sum_copies(grad, place), None, None


class _Combine(torch.autograd.Function):
    """Add up each token's K rows; the gradient copies back to the experts' rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_copies(rows, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (token,) = ctx.saved_tensors
        return grad[token], None, None


def _sum_copies(rows: Float[Tensor, "R I"], place: Int[Tensor, "M K"]) -> Float[Tensor, "M I"]:
    return rows[place.flatten()].unflatten(0, place.shape).sum(1)
