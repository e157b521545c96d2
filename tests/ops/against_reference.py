"""Results of a backend beside the reference in float64: outputs, and gradients of all inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = Sequence[Tensor | None]


def draw_experts(counts: list[int], inner: int, outer: int) -> list[Tensor]:
    """Return rows, their weights, matrices up and down, and counts, as experts take them."""
    g = torch.Generator().manual_seed(sum(counts) + inner)
    shape, experts = (sum(counts), inner), len(counts)
    return [
        torch.randn(shape, generator=g),
        torch.randn(shape[0], 1, generator=g),
        torch.randn(experts, outer, inner, generator=g) / inner**0.5,
        torch.randn(experts, inner, outer, generator=g) / outer**0.5,
        torch.tensor(counts),
    ]


def results(function: Callable[..., Any], inputs: Inputs, *rest: object) -> list[Tensor]:
    """Return outputs, then the gradients of all floating inputs for one fixed cotangent."""
    leaves = [
        t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in inputs
    ]
    outputs = function(*leaves, *rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(99)
    # contiguous and exact in bfloat16, so that every layout and dtype gets the same numbers
    cotangents = [
        torch.randn(tuple(y.shape), generator=generator).bfloat16().to(y.device, y.dtype)
        for y in outputs
    ]
    wanted = [t for t in leaves if t is not None and t.is_floating_point()]
    gradients = torch.autograd.grad(outputs, wanted, cotangents)
    return [y.detach() for y in outputs] + list(gradients)


def doubled(inputs: Inputs) -> list[Tensor | None]:
    """Return the same numbers in float64."""
    return [t.double() if t is not None and t.is_floating_point() else t for t in inputs]


def worst(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest difference of any pair, relative to the largest entry of the exact one."""
    assert len(found) == len(exact)
    ratios = []
    for ours, true in zip(found, exact, strict=True):
        assert ours.shape == true.shape
        assert torch.isfinite(ours).all()
        scale = float(true.abs().max()) if true.numel() else 0.0
        ratios.append(
            float((ours.to(true.device).double() - true).abs().max()) / scale if scale else 0.0
        )
    return max(ratios)
