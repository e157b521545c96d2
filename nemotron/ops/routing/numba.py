"""The way of tokens to their experts by kernels for CPUs."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nemotron.ops.jit.call import kernels, run, scratch

MODULE = "nemotron.ops.routing.kernels"
FORMAT = torch.float32


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "M E"],
        bias: Float[Tensor, " E"],
        given: Int[Tensor, "M K"] | None,
        top_k: int,
        normalize: bool,
        scaling: float,
    ) -> tuple[Tensor, ...]:
        found = kernels(MODULE, FORMAT)
        tokens, num_experts = logits.shape
        scores, weights = torch.empty_like(logits), logits.new_empty(tokens, top_k)
        experts = torch.empty(tokens, top_k, dtype=torch.int64)
        counts = torch.zeros(torch.get_num_threads(), num_experts, dtype=torch.int64)
        ctx.sizes = {"tokens": tokens, "num_experts": num_experts, "top_k": top_k}
        ctx.sizes |= {"normalize": normalize, "scaling": scaling}
        values = {"logits": logits, "bias": bias, "given": 0 if given is None else given}
        values |= {"scores": scores, "experts": experts, "weights": weights, "counts": counts}
        run(found.choose, found.CALL, FORMAT, ctx.sizes | values | scratch(num_experts + top_k))
        ctx.save_for_backward(scores, experts)
        ctx.set_materialize_grads(False)
        counts = counts.sum(0)
        ctx.mark_non_differentiable(experts, counts)
        return weights, scores, experts, counts

    @staticmethod
    def backward(
        ctx: Any, dweights: Tensor | None, dscores: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        scores, experts = ctx.saved_tensors
        found = kernels(MODULE, FORMAT)
        dlogits = torch.empty_like(scores)
        values = {"scores": scores, "experts": experts, "dlogits": dlogits}
        # kept by these names until the kernel has run
        dweights, dscores = (None if d is None else d.contiguous() for d in (dweights, dscores))
        values |= {"dweights": 0 if dweights is None else dweights}
        values |= {"dscores": 0 if dscores is None else dscores}
        run(found.choose_backward, found.CALL, FORMAT, ctx.sizes | values)
        return dlogits, None, None, None, None, None


def topk_routing(
    logits: Float[Tensor, "M E"],
    bias: Float[Tensor, " E"],
    given: Int[Tensor, "M K"] | None,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, ...]:
    """Choose as the reference does; of equal scores the lower number wins."""
    given = None if given is None else given.contiguous()
    bias = bias.float().contiguous()
    return _Choice.apply(logits.contiguous(), bias, given, top_k, normalize, scaling)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Float[Tensor, "M E"],
        padding: Bool[Tensor, "B T"] | None,
        num_rows: int,
        top_k: int,
    ) -> tuple[Tensor, Tensor]:
        found = kernels(MODULE, FORMAT)
        tokens, num_experts = scores.shape
        length = tokens // num_rows
        blocks = -(-length // found.TOKENS)
        sums, load = scores.new_empty(2, num_rows, blocks, num_experts)
        ctx.sizes = {"tokens": tokens, "num_experts": num_experts, "top_k": top_k}
        ctx.sizes |= {"rows": num_rows, "length": length, "blocks": blocks}
        values = _tensors(scores, padding) | {"sums": sums, "load": load}
        run(found.balance, found.CALL, FORMAT, ctx.sizes | values | scratch(num_experts + top_k))
        ctx.save_for_backward(scores, padding)
        load = load.sum(1)
        ctx.mark_non_differentiable(load)
        return sums.sum(1), load

    @staticmethod
    def backward(ctx: Any, dsums: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        scores, padding = ctx.saved_tensors
        found = kernels(MODULE, FORMAT)
        dscores, dsums = torch.empty_like(scores), dsums.contiguous()
        values = _tensors(scores, padding) | {"dsums": dsums, "dscores": dscores}
        run(found.balance_backward, found.CALL, FORMAT, ctx.sizes | values)
        return dscores, None, None, None


def _tensors(scores: Tensor, padding: Tensor | None) -> dict[str, Any]:
    return {"scores": scores, "padding": 0 if padding is None else padding}


def balance_sums(
    scores: Float[Tensor, "M E"], padding: Bool[Tensor, "B T"] | None, num_rows: int, top_k: int
) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E"]]:
    """Add up shares, and count as the reference does; of equal shares the lower number wins."""
    padding = None if padding is None else padding.contiguous()
    return _Balance.apply(scores.contiguous(), padding, num_rows, top_k)


def expert_order(
    weights: Float[Tensor, " copies"],
    experts: Int[Tensor, " copies"],
    token: Int[Tensor, " copies"],
    counts: Int[Tensor, " E"],
    num_tokens: int,
    multiple: int,
) -> tuple[Tensor, ...]:
    """Line up copies by a counting sort."""
    found = kernels(MODULE, FORMAT)
    experts, token = experts.contiguous(), token.contiguous()
    rows = (counts + multiple - 1) // multiple * multiple
    ends = rows.cumsum(0)
    size = int(ends[-1]) if len(ends) else 0
    heads = ends - rows
    ordered = torch.empty(size, dtype=torch.int64)
    place, starts = torch.empty_like(token), torch.empty(num_tokens, dtype=torch.int64)
    values: dict[str, Any] = {"copies": len(token), "tokens": num_tokens, "size": size}
    values["num_experts"] = len(counts)
    values |= {"experts": experts, "token": token, "heads": heads, "ordered": ordered}
    run(found.order, found.CALL, FORMAT, values | {"place": place, "starts": starts})
    weights = weights.new_zeros(size).scatter(0, place, weights)
    return weights, ordered, place, starts, rows
