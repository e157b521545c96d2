"""Products of experts and the activation between them by kernels, beside the formula in float64."""

from contextlib import ExitStack

import pytest
import torch
from against_reference import doubled, draw_experts, results, worst
from torch import Tensor

pytest.importorskip("triton")

from nemotron.ops.grouped_linear import reference, triton
from nemotron.ops.grouped_linear import triton_kernels as kernels
from nemotron.ops.squared_relu import reference as squared_relu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# an expert without rows first, in between and last; one with a row; one with all; tiles of 128 rows
# that are full, begun, or both; widths below a tile, of one, and of one and a part
COUNTS = [[0, 20, 0, 130, 1, 0], [150], [0, 0, 128], [0, 0]]
WIDTHS = [(40, 24), (72, 136)]


def exactly(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    return reference(squared_relu(reference(x, up, counts), weights), down, counts)


def here(tensors: list[Tensor]) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_the_experts_are_the_references(counts: list[int], widths: tuple[int, int]):
    inputs = draw_experts(counts, *widths)
    exact = results(exactly, doubled(inputs))
    # two products in float32 each way
    assert worst(results(triton.grouped_mlp, here(inputs)), exact) <= 5e-6
    narrow = [inputs[0].bfloat16(), inputs[1], *(w.bfloat16() for w in inputs[2:4]), inputs[4]]
    exact = results(exactly, doubled(narrow))
    wide = [narrow[0], narrow[1], *(w.float() for w in narrow[2:4]), narrow[4]]
    found = results(triton.grouped_mlp, here(wide))
    kinds = [torch.bfloat16, torch.bfloat16, *[torch.float32] * 3]
    assert [t.dtype for t in found] == kinds
    # rounded between the products, and the interpreter truncates
    assert worst(found, exact) <= 2**-5


@pytest.mark.slow
@pytest.mark.parametrize("counts", COUNTS[:2], ids=str)
def test_a_product_is_the_references(counts: list[int]):
    x, _, weight, _, counts = draw_experts(counts, 72, 136)
    exact = results(reference, doubled([x, weight, counts]))
    # sums of 72, and of the rows of an expert
    assert worst(results(triton.grouped_linear, here([x, weight, counts])), exact) <= 5e-6
    narrow = [x.bfloat16(), weight.bfloat16(), counts]
    exact = results(reference, doubled(narrow))
    y, dx, dw = results(triton.grouped_linear, here([narrow[0], narrow[1].float(), counts]))
    assert [t.dtype for t in (y, dx, dw)] == [torch.bfloat16, torch.bfloat16, torch.float32]
    # the interpreter truncates to bfloat16
    assert worst([y, dx], exact[:2]) <= 2**-7
    # never rounded to bfloat16
    assert worst([dw], exact[2:]) <= 5e-6


@pytest.mark.slow
def test_what_an_expert_holds_does_not_reach_another():
    x, weights, up, down, counts = draw_experts([70, 3, 60], 40, 24)
    clean = results(triton.grouped_mlp, here([x, weights, up, down, counts]))
    up[1], x[70:73] = torch.nan, torch.nan
    y, dx, dweights, dup, ddown = results(triton.grouped_mlp, here([x, weights, up, down, counts]))
    others = [0, 2]
    for found, before in ((dup, clean[3]), (ddown, clean[4])):
        assert torch.equal(found[others], before[others])
        assert not torch.isfinite(found[1]).any()
    for found, before in ((y, clean[0]), (dx, clean[1]), (dweights, clean[2])):
        assert torch.equal(found[:70], before[:70])
        assert torch.equal(found[73:], before[73:])
        assert not torch.isfinite(found[70:73]).any()


@pytest.mark.parametrize(
    "parameters",
    [
        {"width": 64, "step": 32, "warps": 4, "stages": 2},
        {"width": 256, "step": 128, "warps": 8, "stages": 4},
    ],
    ids=["narrow", "wide"],
)
def test_other_parameters_give_the_same_results(parameters: dict[str, int]):
    inputs = draw_experts([20, 0, 130], 72, 136)
    exact = results(exactly, doubled(inputs))
    with ExitStack() as stack:
        for tunable in kernels.TUNABLES:
            stack.enter_context(tunable.forced(parameters))
        assert worst(results(triton.grouped_mlp, here(inputs)), exact) <= 5e-6


def test_a_weight_that_is_frozen_has_no_gradient_and_changes_no_other():
    x, weights, up, down, counts = here(draw_experts([20, 0, 7], 40, 24))
    whole = results(triton.grouped_mlp, [x, weights, up, down, counts])
    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    y = triton.grouped_mlp(*leaves, up, down, counts)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(99))
    found = torch.autograd.grad(y, leaves, cotangent.bfloat16().to(y.device, y.dtype))
    assert torch.equal(found[0], whole[1])
    assert torch.equal(found[1], whole[2])
