"""Mixture of experts: routed experts in full width or in a latent, beside one shared expert."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nemotron.model.adapter import Adapter
from nemotron.model.config import ModelConfig
from nemotron.model.linear import MLP, Linear
from nemotron.model.router import Choice, FirstRun, Router, Routing, RoutingStats
from nemotron.ops.expert_step import expert_step
from nemotron.ops.grouped_linear import grouped_linear, row_multiple
from nemotron.ops.grouped_mlp import grouped_mlp
from nemotron.ops.routing import TokenCopiesOp, expert_order, token_copies
from nemotron.ops.squared_relu import squared_relu


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
        self,
        x: Float[Tensor, "B T D"],
        stats_name: str | None = None,
        padding: Bool[Tensor, "B S"] | None = None,
        choice: Choice | None = None,
        first_run: FirstRun | None = None,
    ) -> tuple[Float[Tensor, "B T D"], RoutingStats | None]:
        """Return the layer's output and, when `stats_name` is given, the router's statistics.

        `padding` says which tokens of the whole rows these leave out. `choice` says of each token
        its experts or their group, where it is not the router that chooses them. `first_run` is of
        a layer that is computed again.
        """
        tokens = x.flatten(0, 1)  # [M, D]
        routing = self.gate(tokens, choice, first_run)
        latent = tokens if self.fc1_latent_proj is None else self.fc1_latent_proj(tokens)
        dispatched = self.experts.dispatch(latent, routing)
        shared = self.shared_experts(x)  # while tokens may be on their way to other ranks
        routed = self.experts(dispatched)
        if self.fc2_latent_proj is not None:
            routed = self.fc2_latent_proj(routed)
        stats = None
        if stats_name is not None:
            stats = self.gate.statistics(routing, x.shape[0], stats_name, padding)
        return routed.view_as(x) + shared, stats


def _identity(x: Tensor) -> Tensor:
    return x


class Dispatched(NamedTuple):
    """Tokens on their way to the experts held here, and how the experts' results are combined."""

    x: Float[Tensor, "sent I"]
    """What this rank sent; `receive` returns the tokens that it gets instead."""
    token: Int[Tensor, " copies"]
    """The row of the received tokens that each expert's copy is of, in ascending order."""
    experts: Int[Tensor, " copies"]
    """Numbers among the experts held here."""
    weights: Float[Tensor, " copies"]
    counts: Int[Tensor, " E"]
    """Copies for each expert held here."""
    numbers: Int[Tensor, " copies"] | None = None
    """Number of each copy in the whole batch, where the layer has `number_copies`."""
    receive: Callable[[Float[Tensor, "sent I"]], Float[Tensor, "S I"]] = _identity
    """Waits for the tokens from other ranks."""
    combine: Callable[[Float[Tensor, "S I"]], Float[Tensor, "M I"]] = _identity
    """Adds up what all ranks' experts made of each of this rank's own tokens."""


class TokenDispatcher(Protocol):
    """Sends tokens to the ranks that hold their experts; only where ranks share the experts."""

    def __call__(
        self,
        token_copies: TokenCopiesOp,
        x: Float[Tensor, "M I"],
        experts: Int[Tensor, "M K"],
        weights: Float[Tensor, "M K"],
        numbers: Int[Tensor, "M K"] | None,
    ) -> Dispatched:
        """Begin to send each token to its experts, which are given by their numbers among all.

        `token_copies` is the operation of the layer, for rows that are copied or added up here.
        """


class Experts(nn.Module):
    """Routed experts as two stacked matrices; every token reaches its K experts, none drops."""

    dispatcher: TokenDispatcher | None
    """Absent: all experts are here."""
    number_copies: Callable[[int, int], Int[Tensor, "M K"]] | None
    """Numbers the K copies of each of M tokens, for layers that round them at random."""

    def __init__(self, num_experts: int, input_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.dispatcher = self.number_copies = None
        self.up_adapter: Adapter | None = None
        self.down_adapter: Adapter | None = None
        self.grouped_linear, self.squared_relu = grouped_linear, squared_relu
        self.expert_order, self.token_copies = expert_order, token_copies
        self.expert_step, self.grouped_mlp = expert_step, grouped_mlp
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, input_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, input_size, intermediate_size))

    @property
    def is_plain(self) -> bool:
        """Whether its products are those of its weights, in the dtype of activations."""
        adapted = self.up_adapter is not None or self.down_adapter is not None
        return not adapted and "multiply" not in vars(self)

    def dispatch(self, x: Float[Tensor, "M I"], routing: Routing) -> Dispatched:
        """Begin to send each token to its experts; call the module with the result."""
        experts, weights = routing.experts, routing.weights
        numbers = None if self.number_copies is None else self.number_copies(*experts.shape)
        if self.dispatcher is not None:
            return self.dispatcher(self.token_copies, x, experts, weights, numbers)
        token = torch.arange(experts.numel(), device=x.device) // experts.shape[1]
        numbers = None if numbers is None else numbers.flatten()
        return Dispatched(x, token, experts.flatten(), weights.flatten(), routing.counts, numbers)

    def forward(self, dispatched: Dispatched) -> Float[Tensor, "M I"]:
        """Return for each token the weighted sum over its experts."""
        x = dispatched.receive(dispatched.x)
        if not dispatched.token.shape[0]:
            # there is nothing to multiply, but other ranks wait for this one's gradients
            parts = (x, dispatched.weights, *self.parameters())
            return dispatched.combine(torch.zeros_like(x) + sum(part[:0].sum() for part in parts))
        # padding has weight 0, so it changes no gradient
        weights, copies, counts = self.expert_order(
            dispatched.weights,
            dispatched.experts,
            dispatched.token,
            dispatched.counts,
            num_tokens=x.shape[0],
            multiple=row_multiple(x),
        )
        numbers = None
        if dispatched.numbers is not None:
            numbers = dispatched.numbers.new_zeros(copies.token.shape[0])
            numbers = numbers.scatter(0, copies.place, dispatched.numbers)
        rows = self.token_copies.copy(x, *copies)
        if self.is_plain and self.grouped_mlp.takes(rows):
            matrices = self.up_proj, self.down_proj
            rows = self.grouped_mlp(rows, weights.unsqueeze(-1), *matrices, counts)
            return dispatched.combine(self.token_copies.add(rows, *copies))
        hidden = self.multiply(rows, self.up_proj, counts, numbers)
        if self.up_adapter is not None:
            hidden = self.up_adapter.add_grouped(rows, hidden, counts, self.grouped_linear)
        # weights before the down projection, as Megatron-LM does in training
        hidden = self.squared_relu(hidden, weights.unsqueeze(-1))
        rows = self.multiply(hidden, self.down_proj, counts, numbers)
        if self.down_adapter is not None:
            rows = self.down_adapter.add_grouped(hidden, rows, counts, self.grouped_linear)
        return dispatched.combine(self.token_copies.add(rows, *copies))

    def multiply(
        self,
        rows: Float[Tensor, "R K"],
        weight: Float[Tensor, "E N K"],
        counts: Int[Tensor, " E"],
        numbers: Int[Tensor, " R"] | None,
    ) -> Float[Tensor, "R N"]:
        """Multiply each expert's rows by its matrix, rounded to the dtype of the rows.

        `numbers` are the rows' in the whole batch, of use where rows are rounded at random.
        """
        return self.grouped_linear(rows, weight, counts)


def multiplied_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights that are multiplied in the dtype of activations, those of shards apart."""
    for module in model.modules():
        held: tuple[nn.Parameter, ...] = ()
        if isinstance(module, Linear):
            held = (module.weight,)
        elif isinstance(module, Experts):
            held = (module.up_proj, module.down_proj)
        yield from (weight for weight in held if type(weight) is nn.Parameter)
