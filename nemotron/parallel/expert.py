"""Expert parallelism: ranks share the experts of a layer, and tokens travel to those they need.

Each rank weighs and adds up what its own experts make of a token, so that one row of the latent's
width travels back. Everything is added up in the order of the ranks or of a token's experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.moe import Dispatched, Experts
from nemotron.ops.routing import Copies, TokenCopiesOp, count
from nemotron.parallel import collectives
from nemotron.parallel.collectives import Group
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.dims import ParallelDims

Dispatch = Literal["all_gather", "all_to_all"]


def choose_dispatch(config: ParallelConfig, model: ModelConfig, dims: ParallelDims) -> Dispatch:
    """Return how tokens travel; `auto` is what a rank receives least with.

    With all-gather it receives every token of the others. With all-to-all it receives those that
    chose one of its experts: of evenly spread choices 1 - (1 - K/E)^(E/ep), but never more.
    """
    if config.expert_dispatch != "auto":
        return config.expert_dispatch
    experts = model.n_routed_experts
    needed = 1 - (1 - model.num_experts_per_tok / experts) ** (experts / dims.ep)
    # less than a tenth saved is not worth uneven parts, which make ranks wait for the busiest
    return "all_to_all" if needed < 0.9 else "all_gather"


def apply_experts(
    model: HybridLM, group: Group, rank: int, size: int, method: Dispatch
) -> dict[str, tuple[int, int]]:
    """Leave each rank of the group its share of every layer's experts, and dispatch tokens to them.

    Returns, for each parameter that was cut, the first expert kept and the one after the last.
    """
    kept = {}
    for name, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        total = module.up_proj.shape[0]
        assert total % size == 0, f"{name}: {total} experts over {size} ranks"
        num_experts = total // size
        first, stop = rank * num_experts, (rank + 1) * num_experts
        for leaf in ("up_proj", "down_proj"):
            whole = getattr(module, leaf)
            part = whole.detach()[first:stop].clone()
            setattr(module, leaf, nn.Parameter(part, requires_grad=whole.requires_grad))
            kept[f"{name}.{leaf}"] = first, stop
        dispatcher = AllGather if method == "all_gather" else AllToAll
        module.dispatcher = dispatcher(group, rank, size, num_experts)
    return kept


@dataclass(frozen=True)
class AllGather:
    """Every rank gets all tokens; the parts that its experts add to them are summed up on the way.

    A rank's tokens are as many as every other's.
    """

    group: Group
    rank: int
    size: int
    num_experts: int
    """Experts on each rank."""

    def __call__(
        self,
        token_copies: TokenCopiesOp,
        x: Float[Tensor, "M I"],
        experts: Int[Tensor, "M K"],
        weights: Float[Tensor, "M K"],
        numbers: Int[Tensor, "M K"] | None,
    ) -> Dispatched:
        num_tokens, top_k = experts.shape
        # the copies for each rank and the tokens of each, in the one wait for the device: the
        # sizes of what follows must be known here
        counts = count(experts.flatten() // self.num_experts, self.size)
        counts = F.pad(counts, (0, 1), value=num_tokens)
        table = collectives.gather(counts.unsqueeze(0), 0, self.group).tolist()
        assert {row[-1] for row in table} == {num_tokens}, (
            f"tokens of the ranks that share experts: {[row[-1] for row in table]}"
        )
        num_copies = sum(row[self.rank] for row in table)
        everyone = collectives.gather(experts.to(torch.int32), 0, self.group).flatten().long()
        is_here = everyone // self.num_experts == self.rank
        # the last place takes what is for others
        target = torch.where(is_here, is_here.cumsum(0) - 1, num_copies)

        def ours(values: Shaped[Tensor, " copies_of_all"]) -> Shaped[Tensor, " copies"]:
            return values.new_zeros(num_copies + 1).scatter(0, target, values)[:-1]

        local = ours(everyone - self.rank * self.num_experts)
        weights = ours(collectives.all_gather(weights, 0, self.group).flatten())
        if numbers is not None:
            numbers = ours(collectives.gather(numbers, 0, self.group).flatten())
        # tokens go last: what follows them in their group would wait for them
        dispatch = AsyncCollective(self._gather, self._scatter_sum)
        combine = AsyncCollective(self._scatter_sum, self._gather)
        return Dispatched(
            x=dispatch.start(x),
            token=ours(torch.arange(everyone.shape[0], device=x.device) // top_k),
            experts=local,
            weights=weights,
            counts=count(local, self.num_experts),
            numbers=numbers,
            receive=dispatch.finish,
            combine=lambda partial: combine.finish(combine.start(partial)),
        )

    def _gather(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        whole = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        return whole, collectives.all_gather_into(whole, x, group=self.group, async_op=True)

    def _scatter_sum(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        part = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        return part, collectives.reduce_scatter_into(part, x, group=self.group, async_op=True)


@dataclass(frozen=True)
class AllToAll:
    """A token goes once to each rank that holds any of its experts, and its parts come back.

    What a rank sends is cut by the true counts: none is dropped, and a part may be empty.
    """

    group: Group
    rank: int
    size: int
    num_experts: int
    """Experts on each rank."""

    def __call__(
        self,
        token_copies: TokenCopiesOp,
        x: Float[Tensor, "M I"],
        experts: Int[Tensor, "M K"],
        weights: Float[Tensor, "M K"],
        numbers: Int[Tensor, "M K"] | None,
    ) -> Dispatched:
        num_tokens, top_k = experts.shape
        experts, weights = experts.flatten(), weights.flatten()
        order = (experts // self.num_experts).argsort(stable=True)
        experts, token = experts[order], order // top_k  # copies by rank, then by token
        holder = experts // self.num_experts
        is_first = torch.ones_like(holder, dtype=torch.bool)  # of its token on its rank
        is_first[1:] = (holder[1:] != holder[:-1]) | (token[1:] != token[:-1])
        bounds = torch.searchsorted(holder, torch.arange(self.size + 1, device=x.device))
        rows_before = F.pad(is_first.cumsum(0), (1, 0))
        counts = torch.stack([rows_before[bounds].diff(), bounds.diff()], dim=1)  # [ranks, 2]
        one_each = [1] * self.size
        coming = collectives.exchange(counts, one_each, one_each, self.group)
        # the one wait for the device: the sizes of what follows must be known here
        rows_out, copies_out, rows_in, copies_in = torch.cat([counts, coming], dim=1).T.tolist()

        [row_starts] = is_first.nonzero_static(size=sum(rows_out)).T
        rows = _line_up(token[row_starts], num_tokens)
        # one number says which expert, and whether a row begins
        marked = experts % self.num_experts + self.num_experts * is_first
        marked = collectives.exchange(marked.to(torch.int32), copies_out, copies_in, self.group)
        if numbers is not None:
            own = numbers.flatten()[order]
            numbers = collectives.exchange(own, copies_out, copies_in, self.group)
        place = torch.empty_like(order).scatter_(
            0, order, torch.arange(order.shape[0], device=x.device)
        )
        weights = torch.zeros_like(weights).scatter(0, place, weights)  # as `weights[order]`
        weights = collectives.all_to_all(weights, copies_out, copies_in, self.group)
        local = marked.long() % self.num_experts
        # tokens go last: what follows them in their group would wait for them
        dispatch = AsyncCollective(
            self._all_to_all(rows_out, rows_in), self._all_to_all(rows_in, rows_out)
        )
        return Dispatched(
            x=dispatch.start(token_copies.copy(x, *rows)),
            token=(marked // self.num_experts).cumsum(0) - 1,
            experts=local,
            weights=weights,
            counts=count(local, self.num_experts),
            numbers=numbers,
            receive=dispatch.finish,
            combine=lambda partial: token_copies.add(
                collectives.all_to_all(partial, rows_in, rows_out, self.group), *rows
            ),
        )

    def _all_to_all(self, rows_out: list[int], rows_in: list[int]) -> "Launch":
        def begin(x: Tensor) -> tuple[Tensor, dist.Work]:
            result = x.new_empty(sum(rows_in), *x.shape[1:])
            work = dist.all_to_all_single(
                result, x, rows_in, rows_out, group=self.group, async_op=True
            )
            return result, work

        return begin


def _line_up(token: Int[Tensor, " R"], num_tokens: int) -> Copies:
    """Describe rows by the token in each; a token's are added up in their order."""
    ascending, place = token.sort(stable=True)
    starts = torch.searchsorted(ascending, torch.arange(num_tokens, device=token.device))
    return Copies(token, place, starts)


Launch = Callable[[Tensor], tuple[Tensor, dist.Work]]
"""Starts a collective and returns the tensor that it fills."""


class AsyncCollective:
    """A collective that runs while its rank computes, as does that of its gradient.

    The shared expert is computed between `start` and `finish`, in forward and so in backward.
    """

    def __init__(self, forward: Launch, backward: Launch) -> None:
        self.forward, self.backward = forward, backward
        self._running: tuple[Tensor, dist.Work] | None = None

    def start(self, x: Tensor) -> Tensor:
        """Start, and return what `finish` needs."""
        return _Start.apply(x, self)

    def finish(self, started: Tensor) -> Tensor:
        """Wait for the result."""
        return _Finish.apply(started, self)

    def launch(self, collective: Launch, x: Tensor) -> None:
        """Start one direction, without a gradient."""
        self._running = collective(x.contiguous())

    def wait(self) -> Tensor:
        """Return the result of the direction that was launched."""
        assert self._running is not None, "no collective is running"
        result, work = self._running
        work.wait()
        self._running = None
        return result


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, collective: AsyncCollective) -> Tensor:
        ctx.collective = collective
        collective.launch(collective.forward, x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.collective.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, started: Tensor, collective: AsyncCollective) -> Tensor:
        ctx.collective, ctx.shape = collective, started.shape
        # when a block is computed again, that ends where the last tensor is kept: not before this
        ctx.save_for_backward(started.new_empty(0))
        return collective.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.collective.launch(ctx.collective.backward, grad)
        # stands for the gradient on its way; a single value, since it is never read
        return grad.new_zeros(()).expand(ctx.shape), None
