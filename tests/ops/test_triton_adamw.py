"""The Triton kernel of AdamW against torch's, and the copies that it writes."""

import pytest
import torch
from torch import Tensor

from nemotron.ops.adamw import Settings

pytest.importorskip("triton")
from nemotron.ops.adamw.triton import adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# one element, less than a block, a block, several and a part of one
SIZES = [(1,), (3, 7), (32, 32), (5, 700)]
SETTINGS = Settings(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, coefficient=0.3)


def drawn(seed: int) -> list[list[Tensor]]:
    """Return parameters, gradients, moments and counts of updates so far."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    parameters, gradients, averages = ([normal(shape) for shape in SIZES] for _ in range(3))
    squares = [normal(shape).square() for shape in SIZES]
    steps = [torch.tensor(float(n), device=DEVICE) for n in (1, 2, 40, 100_000)]
    return [parameters, gradients, averages, squares, steps]


def in_float64(found: list[list[Tensor]], settings: Settings) -> list[list[Tensor]]:
    """Return parameters and moments after the step by the paper's formula."""
    (beta, beta_sq), results = settings.betas, [[], [], []]
    for tensors in zip(*found, strict=True):
        p, g, m, v, step = (t.double() for t in tensors)
        g = g * settings.coefficient
        m, v = beta * m + (1 - beta) * g, beta_sq * v + (1 - beta_sq) * g * g
        unbiased = (v / (1 - beta_sq**step)).sqrt() + settings.eps
        p = p - settings.lr * settings.weight_decay * p
        p = p - settings.lr * m / (1 - beta**step) / unbiased
        for kept, value in zip(results, (p, m, v), strict=True):
            kept.append(value)
    return results


@pytest.mark.parametrize("coefficient", [1.0, 0.3])
def test_a_step_is_the_formulas_and_torchs(coefficient: float):
    settings = SETTINGS._replace(coefficient=coefficient)
    found, peer = drawn(0), drawn(0)
    exact = in_float64(found, settings)
    none = [None] * len(SIZES)
    adamw(*found, none, settings)
    parameters, gradients, averages, squares, steps = peer
    torch._foreach_mul_(gradients, coefficient)
    torch._fused_adamw_(
        *(parameters, gradients, averages, squares, [], steps),
        lr=settings.lr,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        amsgrad=False,
        maximize=False,
    )
    # three roundings of float32, the last one of the parameter
    for place, true in zip((0, 2, 3), exact, strict=True):
        torch.testing.assert_close(found[place], [t.float() for t in true], rtol=5e-7, atol=1e-7)
        torch.testing.assert_close(found[place], peer[place], rtol=1e-6, atol=2e-7)
    assert [int(step) for step in found[4]] == [1, 2, 40, 100_000]  # whoever calls counts


def test_copies_are_the_new_values_rounded_and_only_where_they_are_wanted():
    found = drawn(1)
    gradients = [g.clone() for g in found[1]]
    copies: list[Tensor | None] = [torch.full_like(p, 9.0).bfloat16() for p in found[0]]
    copies[1] = None
    adamw(*found, copies, SETTINGS)
    for copy, parameter in zip(copies, found[0], strict=True):
        if copy is not None:
            # the interpreter cuts off what a GPU rounds
            off = 0 if DEVICE == "cuda" else 2**-7
            torch.testing.assert_close(copy, parameter.bfloat16(), rtol=off, atol=0)
    assert all(map(torch.equal, found[1], gradients))  # torch's kernel scales them in place


def test_autograd_sees_that_what_it_saved_has_changed():
    found = drawn(2)
    weight = found[0][2].requires_grad_()
    x = torch.ones(32, 32, device=DEVICE, requires_grad=True)
    y = (x @ weight).sum()
    with torch.no_grad():
        adamw(*found, [None] * len(SIZES), SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
