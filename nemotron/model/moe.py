"""Mixture of experts: routed experts in full width or in a latent, beside one shared expert."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron.model.config import ModelConfig
from nemotron.model.linear import Linear
from nemotron.model.mlp import MLP
from nemotron.model.router import Router, Routing, RoutingStats
from nemotron.ops.grouped_linear import grouped_linear, row_multiple
from nemotron.ops.squared_relu import squared_relu
from nemotron.ops.token_copies import TokenCopiesOp, token_copies


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
        sent = self.experts.send(latent, routing)
        shared = self.shared_experts(x)  # while tokens may be on their way to other ranks
        routed = self.experts(sent)
        if self.fc2_latent_proj is not None:
            routed = self.fc2_latent_proj(routed)
        stats = None
        if stats_name is not None:
            stats = self.gate.statistics(routing, num_rows=x.shape[0], name=stats_name)
        return routed.view_as(x) + shared, stats


def _stay(x: Tensor) -> Tensor:
    return x


class Sent(NamedTuple):
    """Tokens on their way to the experts held here, and the way back for what these return."""

    x: Float[Tensor, "sent I"]
    """What left this rank; `arrive` returns what came."""
    token: Int[Tensor, " copies"]
    """The row of what came that each expert's copy is of, in ascending order."""
    experts: Int[Tensor, " copies"]
    """Numbers among the experts held here."""
    weights: Float[Tensor, " copies"]
    counts: Int[Tensor, " E"]
    """Copies for each expert held here."""
    numbers: Int[Tensor, " copies"] | None = None
    """Number of each copy in the whole batch, where the layer has `number_copies`."""
    arrive: Callable[[Float[Tensor, "sent I"]], Float[Tensor, "S I"]] = _stay
    """Waits for the tokens that come."""
    back: Callable[[Float[Tensor, "S I"]], Float[Tensor, "M I"]] = _stay
    """Adds up what all ranks made of each of this rank's own tokens."""


class Exchange(Protocol):
    """Brings tokens to the ranks that hold their experts; only where ranks share the experts."""

    def __call__(
        self,
        token_copies: TokenCopiesOp,
        x: Float[Tensor, "M I"],
        experts: Int[Tensor, "M K"],
        weights: Float[Tensor, "M K"],
        numbers: Int[Tensor, "M K"] | None,
    ) -> Sent:
        """Send each token, with its experts' numbers among all, to whoever needs it.

        `token_copies` is the operation of the layer, for rows that are copied or added up here.
        """


class Experts(nn.Module):
    """Routed experts as two stacked matrices; every token reaches its K experts, none drops."""

    exchange: Exchange | None
    number_copies: Callable[[int, int], Int[Tensor, "M K"]] | None
    """Numbers the K copies of each of M tokens, for layers that round them at random."""

    def __init__(self, num_experts: int, input_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.exchange = self.number_copies = None
        self.grouped_linear, self.squared_relu = grouped_linear, squared_relu
        self.token_copies = token_copies
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, input_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, input_size, intermediate_size))

    def send(self, x: Float[Tensor, "M I"], routing: Routing) -> Sent:
        """Begin to bring each token to its experts; calling the module on the result goes on."""
        experts, weights = routing.experts, routing.weights
        numbers = None if self.number_copies is None else self.number_copies(*experts.shape)
        if self.exchange is not None:
            return self.exchange(self.token_copies, x, experts, weights, numbers)
        token = torch.arange(experts.numel(), device=x.device) // experts.shape[1]
        numbers = None if numbers is None else numbers.flatten()
        return Sent(x, token, experts.flatten(), weights.flatten(), routing.counts, numbers)

    def forward(self, sent: Sent) -> Float[Tensor, "M I"]:
        """Return for each token the weighted sum over its experts."""
        x = sent.arrive(sent.x)
        if not sent.token.shape[0]:
            # there is nothing to multiply, but other ranks wait for this one's gradients
            parts = (x, sent.weights, self.up_proj, self.down_proj)
            return sent.back(torch.zeros_like(x) + sum(part[:0].sum() for part in parts))
        copies, counts = _arrange(sent, x.shape[0], row_multiple(x))
        # rows that only fill up an expert's share weigh nothing, so they change no gradient
        weights = sent.weights.new_zeros(copies.token.shape[0])
        weights = weights.scatter(0, copies.place, sent.weights)
        numbers = None
        if sent.numbers is not None:
            numbers = sent.numbers.new_zeros(copies.token.shape[0])
            numbers = numbers.scatter(0, copies.place, sent.numbers)
        rows = self.token_copies.copy(x, *copies)
        hidden = self.multiply(rows, self.up_proj, counts, numbers)
        # weights before the down projection, as Megatron-LM does in training
        hidden = self.squared_relu(hidden, weights.unsqueeze(-1))
        rows = self.multiply(hidden, self.down_proj, counts, numbers)
        return sent.back(self.token_copies.add(rows, *copies))

    def multiply(
        self,
        rows: Float[Tensor, "R K"],
        weight: Float[Tensor, "E N K"],
        counts: Int[Tensor, " E"],
        numbers: Int[Tensor, " R"] | None,
    ) -> Float[Tensor, "R N"]:
        """Multiply each expert's rows by its matrix, cast to the dtype of the rows.

        `numbers` are the rows' in the whole batch, of use where rows are rounded at random.
        """
        return self.grouped_linear(rows, weight.to(rows.dtype), counts)


class Copies(NamedTuple):
    """Copies of tokens, lined up as the rows of a matrix: what `ops.token_copies` takes."""

    token: Int[Tensor, " R"]
    """The token in each row."""
    place: Int[Tensor, " copies"]
    """The rows of all tokens' copies, token after token; rows that only fill up are not here."""
    starts: Int[Tensor, " M"]
    """Where the copies of each token begin in `place`."""


def _arrange(sent: Sent, num_tokens: int, multiple: int) -> tuple[Copies, Int[Tensor, " E"]]:
    """Line up the copies by expert, each expert's share rounded up to `multiple` with token 0.

    Returns the rows of each expert, too.
    """
    # 16 bits take a quarter of the passes that a GPU's radix sort makes over 64
    order = sent.experts.to(torch.int16).argsort(stable=True)
    row = torch.arange(order.shape[0], device=order.device)
    token, counts = sent.token[order], sent.counts
    if multiple > 1:
        counts = (counts + multiple - 1) // multiple * multiple
        filled = F.pad((counts - sent.counts).cumsum(0), (1, 0))
        row = row + filled[sent.experts[order]]
        token = token.new_zeros(int(counts.sum())).scatter_(0, row, token)
    place = torch.empty_like(order).scatter_(0, order, row)
    starts = torch.searchsorted(sent.token, torch.arange(num_tokens, device=order.device))
    return Copies(token, place, starts), counts
