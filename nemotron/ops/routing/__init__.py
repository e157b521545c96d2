"""The way of tokens to their experts: who goes where, in which order, and back again.

`expert_order` and `token_copies` describe the same matrix of R rows. `token` says which token each
row is a copy of. `place` lists the rows of all tokens' copies, token after token, and `starts`
where each token's begin in it: a token may have any number of copies, and rows of padding are in no
list.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend, Operation, numba_backend, triton_backend


class Routed(NamedTuple):
    """What was decided for M tokens."""

    weights: Float[Tensor, "M K"]
    """Of the chosen experts."""
    scores: Float[Tensor, "M E"]
    """Sigmoid of the logits, before the bias."""
    experts: Int[Tensor, "M K"]
    """The chosen ones, in descending order of score and bias unless they were given."""
    counts: Int[Tensor, " E"]
    """Tokens that each expert gets."""


class TopkRoutingOp(Operation):
    """Choose the K experts of each token with the largest sigmoid plus bias, and weigh them.

    The bias chooses, the sigmoid alone weighs: with `normalize` the K weights of a token add up to
    1 before they are multiplied by `scaling`. With more than one group of experts, only those of
    the `top_groups` best are considered; a group's score is the sum of its best K / top_groups
    experts. Which of equal scores wins is the backend's affair: kernels take the lower number,
    and torch's `topk` promises nothing. Logits are float32 or wider, and so is all else. Gradients
    of weights and scores reach the logits; the bias has none.
    Source: NVIDIA/Megatron-LM: megatron/core/transformer/moe/moe_utils.py.
    """

    def __call__(
        self,
        logits: Float[Tensor, "M E"],
        bias: Float[Tensor, " E"],
        given: Int[Tensor, "M K"] | None = None,
        *,
        top_k: int,
        num_groups: int = 1,
        top_groups: int = 1,
        normalize: bool = True,
        scaling: float = 1.0,
    ) -> Routed:
        """Return what was decided; with `given` the experts are known, and only weighed."""
        sizes = (logits.shape[1], top_k)
        function = self.select(logits, sizes, groups=num_groups > 1)
        rest = (top_k, num_groups, top_groups, normalize, scaling)
        return Routed(*function(logits, bias, given, *rest))


def choose(
    biased: Float[Tensor, "M E"], top_k: int, num_groups: int, top_groups: int
) -> Int[Tensor, "M K"]:
    """Return the best experts of the best groups."""
    if num_groups > 1:
        # a group's score is the sum of its best top_k / top_groups experts
        grouped = biased.unflatten(1, (num_groups, -1))  # [M, groups, E / groups]
        best = grouped.topk(top_k // top_groups, dim=-1).values.sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool)
        allowed.scatter_(1, best.topk(top_groups, dim=-1).indices, True)
        biased = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
    return biased.topk(top_k, dim=-1).indices


def count(
    numbers: Int[Tensor, " N"], size: int, weights: Int[Tensor, " N"] | None = None
) -> Int[Tensor, " size"]:
    """Return how often each number below `size` is there; unlike `bincount`, without a wait."""
    counts = torch.zeros(size, dtype=torch.int64, device=numbers.device)
    return counts.scatter_add_(0, numbers, torch.ones_like(numbers) if weights is None else weights)


def reference(
    logits: Float[Tensor, "M E"],
    bias: Float[Tensor, " E"],
    given: Int[Tensor, "M K"] | None,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, ...]:
    """Return weights, scores, experts and the tokens of each expert."""
    scores = logits.sigmoid()
    experts = given
    if experts is None:
        experts = choose(scores.detach() + bias, top_k, num_groups, top_groups)
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling, scores, experts, count(experts.flatten(), logits.shape[1])


def _too_wide(num_experts: int, top_k: int) -> str | None:
    if num_experts > MOST_EXPERTS or top_k > MOST_CHOSEN:
        return f"takes up to {MOST_CHOSEN} of {MOST_EXPERTS} experts, not {top_k} of {num_experts}"
    return None


MOST_EXPERTS, MOST_CHOSEN = 1024, 64
"""A row of scores must fit into the registers of a program, which passes over it K times."""

KERNELS = "nemotron.ops.routing.numba"
FLOAT32 = frozenset({torch.float32})

topk_routing = TopkRoutingOp(
    "topk_routing",
    [
        triton_backend(
            "nemotron.ops.routing.topk_triton",
            "topk_routing",
            by_name=True,  # has not run on a GPU yet
            limit=_too_wide,
        ),
        numba_backend(KERNELS, "topk_routing", dtypes=FLOAT32),
        Backend("reference", reference, features=frozenset({"groups"})),
    ],
    dtype=torch.float32,
)


class BalanceSumsOp(Operation):
    """Add up over each row of tokens what its balance loss is made of.

    That are each expert's share of a token's scores, and in how many tokens' unbiased top K it is;
    tokens that are `padding` count nowhere. Only the shares have a gradient.
    """

    def __call__(
        self,
        scores: Float[Tensor, "M E"],
        padding: Bool[Tensor, "B T"] | None,
        *,
        num_rows: int,
        top_k: int,
    ) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E"]]:
        """Return the sums of the shares, and the counts in the scores' dtype."""
        function = self.select(scores, (scores.shape[1], top_k))
        return function(scores, padding, num_rows, top_k)


def add_up(
    scores: Float[Tensor, "M E"], padding: Bool[Tensor, "B T"] | None, num_rows: int, top_k: int
) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E"]]:
    """Return sums of shares, and counts."""
    share = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    share = share.unflatten(0, (num_rows, -1))  # [B, T, E]
    if padding is not None:
        share = share.masked_fill(padding.unsqueeze(-1), 0)
    with torch.no_grad():
        chosen = share.topk(top_k, dim=-1).indices.flatten(1)  # [B, T * K]
        load = torch.zeros_like(share[:, 0])
        ones = torch.ones_like(chosen, dtype=load.dtype)
        if padding is not None:
            ones = ones.masked_fill_(padding.repeat_interleave(top_k, dim=1), 0)
        load.scatter_add_(1, chosen, ones)
    return share.sum(1), load


balance_sums = BalanceSumsOp(
    "balance_sums",
    [
        triton_backend(
            "nemotron.ops.routing.balance_triton",
            "balance_sums",
            by_name=True,  # has not run on a GPU yet
            limit=_too_wide,
        ),
        numba_backend(KERNELS, "balance_sums", dtypes=FLOAT32),
        Backend("reference", add_up),
    ],
    dtype=torch.float32,
)


class Copies(NamedTuple):
    """Copies of tokens, lined up as the rows of a matrix: what `token_copies` takes."""

    token: Int[Tensor, " R"]
    """The token in each row."""
    place: Int[Tensor, " copies"]
    """The rows of all tokens' copies, token after token, without padding."""
    starts: Int[Tensor, " M"]
    """Where the copies of each token begin in `place`."""


class ExpertOrderOp(Operation):
    """Line up copies of tokens by expert, those of one expert as they were: a stable sort.

    Copy i is of token `token[i]`, which ascends, for expert `experts[i]`; `counts` says how many
    there are of each. Each expert's rows are padded to a `multiple` with copies of token 0 whose
    weight is 0; unless it is 1, that makes the host wait for a GPU.
    """

    def __call__(
        self,
        weights: Float[Tensor, " copies"],
        experts: Int[Tensor, " copies"],
        token: Int[Tensor, " copies"],
        counts: Int[Tensor, " E"],
        num_tokens: int,
        multiple: int = 1,
    ) -> tuple[Float[Tensor, " R"], Copies, Int[Tensor, " E"]]:
        """Return the rows' weights, their description, and how many there are of each expert."""
        inputs = weights, experts, token, counts, num_tokens, multiple
        weights, *lists, rows = self.select(weights)(*inputs)
        return weights, Copies(*lists), rows


def sort(
    weights: Float[Tensor, " copies"],
    experts: Int[Tensor, " copies"],
    token: Int[Tensor, " copies"],
    counts: Int[Tensor, " E"],
    num_tokens: int,
    multiple: int,
) -> tuple[Tensor, ...]:
    """Return the rows' weights and tokens, `place`, `starts`, and the rows of each expert."""
    # 16 bits take a quarter of the passes that a GPU's radix sort makes over 64
    order = experts.to(torch.int16).argsort(stable=True)
    row = torch.arange(order.shape[0], device=order.device)
    ordered, rows = token[order], counts
    if multiple > 1:
        rows = (counts + multiple - 1) // multiple * multiple
        padding = F.pad((rows - counts).cumsum(0), (1, 0))
        row = row + padding[experts[order]]
        ordered = ordered.new_zeros(int(rows.sum())).scatter_(0, row, ordered)
    place = torch.empty_like(order).scatter_(0, order, row)
    starts = torch.searchsorted(token, torch.arange(num_tokens, device=order.device))
    weights = weights.new_zeros(ordered.shape[0]).scatter(0, place, weights)
    return weights, ordered, place, starts, rows


expert_order = ExpertOrderOp(
    "expert_order",
    [
        triton_backend(
            "nemotron.ops.routing.order_triton",
            "expert_order",
            by_name=True,  # has not run on a GPU yet
        ),
        numba_backend(KERNELS, "expert_order", dtypes=FLOAT32),
        Backend("reference", sort),
    ],
    dtype=torch.float32,
)

Direction = Literal["copy", "add"]


class TokenCopiesOp(Operation):
    """Copy tokens to rows and add up rows of tokens; each is the other's gradient."""

    def copy(
        self,
        x: Float[Tensor, "M I"],
        token: Int[Tensor, " R"],
        place: Int[Tensor, " copies"],
        starts: Int[Tensor, " M"],
    ) -> Float[Tensor, "R I"]:
        """Copy each token to its rows; a token's gradient is the sum of those of its copies."""
        return self.select(x)(x, token, place, starts, "copy")

    def add(
        self,
        rows: Float[Tensor, "R I"],
        token: Int[Tensor, " R"],
        place: Int[Tensor, " copies"],
        starts: Int[Tensor, " M"],
    ) -> Float[Tensor, "M I"]:
        """Add up the rows of each token in the order of `place`; 0 where it has none.

        Sums are taken in float32 or wider and rounded once. Rows of padding get the gradient of the
        token that `token` names, so whoever made them must give them no weight.
        """
        # making the sums again would take the rows, which nobody else keeps
        return self.fittest(rows)(rows, token, place, starts, "add")


def copy_or_add(
    values: Float[Tensor, "before I"],
    token: Int[Tensor, " R"],
    place: Int[Tensor, " copies"],
    starts: Int[Tensor, " M"],
    direction: Direction,
) -> Float[Tensor, "after I"]:
    """Return the rows of tokens for `copy`, the tokens' sums of rows for `add`."""
    if direction == "copy":
        return values.index_select(0, token)
    wide = torch.promote_types(values.dtype, torch.float32)
    ends = torch.cat([starts[1:], starts.new_tensor([place.shape[0]])])
    number = torch.arange(place.shape[0], device=place.device)
    belongs = (number >= starts[:, None]) & (number < ends[:, None])  # [M, copies]
    return (belongs.to(wide) @ values.to(wide).index_select(0, place)).to(values.dtype)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(place, starts)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum(grad, *ctx.saved_tensors), None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sum(rows, place, starts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None, None


def _sum(rows: Tensor, place: Tensor, starts: Tensor) -> Tensor:
    # no atomic adds, one rounding, and no intermediate with a row for each copy
    return F.embedding_bag(place, rows.contiguous(), starts, mode="sum")


def embedding_bag(
    values: Float[Tensor, "before I"],
    token: Int[Tensor, " R"],
    place: Int[Tensor, " copies"],
    starts: Int[Tensor, " M"],
    direction: Direction,
) -> Float[Tensor, "after I"]:
    """Copies by index; sums as bags of an embedding, whose rows torch adds up where they lie.

    Each direction's gradient is the other direction.
    """
    function = _Copy if direction == "copy" else _Add
    return function.apply(values, token, place, starts)


token_copies = TokenCopiesOp(
    "token_copies",
    [
        triton_backend(
            "nemotron.ops.routing.copies_triton",
            "token_copies",
        ),
        Backend("embedding_bag", embedding_bag),
        Backend("reference", copy_or_add),
    ],
)
