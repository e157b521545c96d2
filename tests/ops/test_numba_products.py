"""Products by kernels for CPUs: linear layers and experts beside the formula in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from against_reference import doubled, draw_experts, results, worst
from torch import Tensor

from nemotron.ops.grouped_linear import reference
from nemotron.ops.linear import reference as linear_reference
from nemotron.ops.squared_relu import reference as squared_relu

pytest.importorskip("numba", reason="numba is not installed")
from nemotron.ops.grouped_linear import numba
from nemotron.ops.grouped_mlp import numba as mlp

# an expert without rows first, in between and last; one with a row; one with all; blocks of 64 rows
# that are full, begun, or both; widths below a strip of 16, of several and a part, and so many that
# a sum is taken in parts and a result is written in parts
COUNTS = [[0, 20, 0, 130, 1, 0], [150], [0, 0, 64], [0, 0]]
WIDTHS = [(5, 13), (40, 24), (272, 300)]


def exactly(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    return reference(squared_relu(reference(x, up, counts), weights), down, counts)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_products_and_experts_are_the_references(counts: list[int], widths: tuple[int, int]):
    inputs = draw_experts(counts, *widths)
    x, _, up, _, counts = inputs
    exact = results(reference, doubled([x, up, counts]))
    # sums of 272 numbers, and of the rows of an expert
    assert worst(results(numba.grouped_linear, [x, up, counts]), exact) <= 2e-6
    exact = results(exactly, doubled(inputs))
    # two products each way
    assert worst(results(mlp.grouped_mlp, inputs), exact) <= 5e-6


@pytest.mark.parametrize("counts", COUNTS[:2], ids=str)
def test_bfloat16_is_multiplied_in_float32_and_rounded_once(counts: list[int]):
    x, weights, up, down, counts = draw_experts(counts, 72, 136)
    x = x.bfloat16()
    rounded = [w.bfloat16().float() for w in (up, down)]
    exact = results(reference, doubled([x, rounded[0], counts]))
    y, dx, dw = results(numba.grouped_linear, [x, up, counts])
    assert [t.dtype for t in (y, dx, dw)] == [torch.bfloat16, torch.bfloat16, torch.float32]
    # half a unit of the last of eight binary places
    assert worst([y, dx], exact[:2]) <= 2**-8
    # never rounded to bfloat16
    assert worst([dw], exact[2:]) <= 5e-6
    stored = [w.bfloat16() for w in (up, down)]
    same = results(numba.grouped_linear, [x, stored[0], counts])
    assert all(map(torch.equal, same, [y, dx, dw.bfloat16()]))
    exact = results(exactly, doubled([x, weights, *rounded, counts]))
    found = results(mlp.grouped_mlp, [x, weights, up, down, counts])
    assert [t.dtype for t in found] == [torch.bfloat16] * 2 + [torch.float32] * 3
    # the rows before and after the activation are rounded, too
    assert worst(found, exact) <= 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_is_the_reference(dtype: torch.dtype):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 50, 40, generator=g).to(dtype)
    weight = torch.randn(70, 40, generator=g)
    exact = results(linear_reference, doubled([x, weight.to(dtype)]))
    found = results(numba.linear, [x, weight])
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
    assert worst(found, exact) <= (2e-6 if dtype == torch.float32 else 2**-8)
    # rows that do not lie one behind the other, and a gradient of one side alone
    wide = torch.zeros(50, 3, 43, dtype=dtype)
    wide[..., 2:42] = x.transpose(0, 1)
    sliced = wide[..., 2:42].transpose(0, 1)
    assert torch.equal(numba.linear(sliced, weight), found[0])
    for leaf in (0, 1):
        inputs = [t.clone().requires_grad_(i == leaf) for i, t in enumerate((x, weight))]
        slope = torch.randn(3, 50, 70, generator=torch.Generator().manual_seed(99))
        slope = slope.bfloat16().to(dtype)
        (one,) = torch.autograd.grad(numba.linear(*inputs), inputs[leaf], slope)
        assert torch.equal(one, found[1 + leaf])
    assert numba.linear(x[:, :0], weight).shape == (3, 0, 70)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_converted_to_that_of_the_rows(dtype: torch.dtype):
    x, weights, up, down, counts = draw_experts([20, 0, 130], 40, 24)
    stored = up.to(dtype), down.to(dtype)
    wide = stored[0].float(), stored[1].float()
    same = results(numba.linear, [x, wide[0][0]])
    found = results(numba.linear, [x, stored[0][0]])
    assert all(map(torch.equal, found, [*same[:2], same[2].to(dtype)]))
    same = results(mlp.grouped_mlp, [x, weights, *wide, counts])
    for up, down in (stored, (stored[0], wide[1])):
        found = results(mlp.grouped_mlp, [x, weights, up, down, counts])
        kinds = [*[torch.float32] * 3, up.dtype, down.dtype]
        assert all(torch.equal(f, s.to(k)) for f, s, k in zip(found, same, kinds, strict=True))


def test_experts_whose_matrices_are_not_trained():
    x, weights, up, down, counts = draw_experts([20, 0, 130], 40, 24)
    whole = results(mlp.grouped_mlp, [x, weights, up, down, counts])
    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    y = mlp.grouped_mlp(*leaves, up, down, counts)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(99)).bfloat16().float()
    assert all(map(torch.equal, torch.autograd.grad(y, leaves, slope), whole[1:3]))
    down.requires_grad_()
    (alone,) = torch.autograd.grad(mlp.grouped_mlp(x, weights, up, down, counts), down, slope)
    assert torch.equal(alone, whole[4])


def test_what_an_expert_holds_does_not_reach_another():
    x, weights, up, down, counts = draw_experts([70, 3, 60], 40, 24)
    clean = results(mlp.grouped_mlp, [x, weights, up, down, counts])
    up[1], x[70:73] = torch.nan, torch.nan
    y, dx, dweights, dup, ddown = results(mlp.grouped_mlp, [x, weights, up, down, counts])
    others = [0, 2]
    for found, before in ((dup, clean[3]), (ddown, clean[4])):
        assert torch.equal(found[others], before[others])
        assert not torch.isfinite(found[1]).any()
    for found, before in ((y, clean[0]), (dx, clean[1]), (dweights, clean[2])):
        assert torch.equal(found[:70], before[:70])
        assert torch.equal(found[73:], before[73:])
        assert not torch.isfinite(found[70:73]).any()


@pytest.mark.parametrize("kernel", [numba.grouped_linear, mlp.grouped_mlp])
def test_any_number_of_threads_and_what_ran_before_give_the_same_bits(kernel: Callable[..., Any]):
    inputs = draw_experts([0, 200, 3, 130], 272, 300)
    inputs = inputs if kernel is mlp.grouped_mlp else [inputs[0], inputs[2], inputs[4]]
    before, found = torch.get_num_threads(), []
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        try:
            # leaves other numbers in the memory that is kept
            results(mlp.grouped_mlp, draw_experts([300, threads], 64, 400))
            found.append(results(kernel, inputs))
        finally:
            torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
