"""Mixture of experts: routed experts in full width or in a latent, beside one shared expert."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
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


class Sent(NamedTuple):
    """Tokens that came to the experts held here, and the way back for what these return."""

    x: Float[Tensor, "S I"]
    experts: Int[Tensor, "S W"]
    """Numbers among the experts held here; their count where a slot is empty."""
    weights: Float[Tensor, "S W"]
    back: Callable[[Float[Tensor, "S I"]], Float[Tensor, "M I"]]
    """Adds up what all ranks made of each of this rank's own tokens."""


class Exchange(Protocol):
    """Brings tokens to the ranks that hold their experts; only where ranks share the experts."""

    def __call__(
        self, x: Float[Tensor, "M I"], experts: Int[Tensor, "M K"], weights: Float[Tensor, "M K"]
    ) -> Sent:
        """Send each token, with its experts' numbers among all, to whoever needs it."""


class Experts(nn.Module):
    """Routed experts as two stacked matrices; every token reaches its K experts, none drops."""

    exchange: Exchange | None

    def __init__(self, num_experts: int, input_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.exchange = None
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, input_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, input_size, intermediate_size))

    def forward(self, x: Float[Tensor, "M I"], routing: Routing) -> Float[Tensor, "M I"]:
        """Send each token to its experts and add up what they return, weighted."""
        if self.exchange is None:
            return self.compute(x, routing.experts, routing.weights, routing.counts)
        sent = self.exchange(x, routing.experts, routing.weights)
        num_experts = self.up_proj.shape[0]
        counts = torch.bincount(sent.experts.flatten(), minlength=num_experts + 1)[:num_experts]
        return sent.back(self.compute(sent.x, sent.experts, sent.weights, counts))

    def compute(
        self,
        x: Float[Tensor, "M I"],
        experts: Int[Tensor, "M K"],
        weights: Float[Tensor, "M K"],
        counts: Int[Tensor, " E"],
    ) -> Float[Tensor, "M I"]:
        """Return the weighted sum over each token's experts among those held here."""
        has_empty = self.exchange is not None
        token, place, counts = _arrange(experts, counts, row_multiple(x), has_empty=has_empty)
        rows = _Dispatch.apply(x, token, place, has_empty)  # [R, I]
        # rows that only fill up an expert's share weigh nothing, so they change no gradient
        row_weights = weights.new_zeros(token.shape[0] + 1)  # the last is that of empty slots
        row_weights = row_weights.scatter(0, place.flatten(), weights.flatten())[:-1]
        hidden = self.multiply(rows, self.up_proj, counts)
        # weights before the down projection, as Megatron-LM does in training
        hidden = squared_relu(hidden, row_weights.unsqueeze(-1))
        rows = self.multiply(hidden, self.down_proj, counts)
        return _Combine.apply(rows, token, place, has_empty)

    def multiply(
        self, rows: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
    ) -> Float[Tensor, "R N"]:
        """Multiply each expert's rows by its matrix, cast to the dtype of the rows."""
        return grouped_linear(rows, weight.to(rows.dtype), counts)


def _arrange(
    experts: Int[Tensor, "M K"], counts: Int[Tensor, " E"], multiple: int, *, has_empty: bool
) -> tuple[Int[Tensor, " R"], Int[Tensor, "M K"], Int[Tensor, " E"]]:
    """Line up the copies of all tokens by expert, each expert's share rounded up to `multiple`.

    Returns the token in each row (token 0 where a row only fills up), the row of each token's
    copies (R, one too many, where a slot is empty), and the rows of each expert.
    """
    flat = experts.flatten()
    order = flat.argsort(stable=True)  # empty slots, whose number is the largest, come last
    total = order.shape[0]
    row = torch.arange(total, device=order.device)
    padded = counts
    if multiple > 1:
        padded = (counts + multiple - 1) // multiple * multiple
        filled = F.pad((padded - counts).cumsum(0), (1, 0))
        row = row + filled[flat[order]]
    if multiple > 1 or has_empty:
        total = int(padded.sum())
        row = row.clamp(max=total)
    token = order.new_zeros(total + 1)
    token[row] = order // experts.shape[1]
    place = torch.empty_like(order)
    place[order] = row
    return token[:total], place.view_as(experts), padded


class _Dispatch(torch.autograd.Function):
    """Copy each token to its experts' rows; the gradient is the adjoint, without atomic adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor, has_empty: bool) -> Tensor:
        ctx.save_for_backward(place)
        ctx.has_empty = has_empty
        return x[token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return _sum_copies(grad, place, ctx.has_empty), None, None, None


class _Combine(torch.autograd.Function):
    """Add up each token's K rows; the gradient copies back to the experts' rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor, has_empty: bool) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_copies(rows, place, has_empty)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (token,) = ctx.saved_tensors
        return grad[token], None, None, None


def _sum_copies(
    rows: Float[Tensor, "R I"], place: Int[Tensor, "M K"], has_empty: bool
) -> Float[Tensor, "M I"]:
    if has_empty:
        rows = F.pad(rows, (0, 0, 0, 1))  # what empty slots add
    return rows[place.flatten()].unflatten(0, place.shape).sum(1)
