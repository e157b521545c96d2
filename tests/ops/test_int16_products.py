"""Products in 16-bit integers: exact where they must be, and as near as bfloat16 elsewhere."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from against_reference import doubled, draw_experts, results, worst
from torch import Tensor

from nemotron.ops.grouped_linear import reference
from nemotron.ops.squared_relu import reference as squared_relu
from tests.support.models import build, gradients, tokens

pytest.importorskip("numba", reason="numba is not installed")
import numpy as np

from nemotron.ops.apply import apply
from nemotron.ops.config import OpsConfig
from nemotron.ops.grouped_linear import int16
from nemotron.ops.grouped_mlp import int16 as mlp
from nemotron.ops.grouped_mlp import numba as float32_mlp

COUNTS = [[0, 20, 0, 130, 1, 0], [150], [0, 0, 64], [0, 0]]
WIDTHS = [(5, 13), (40, 24), (272, 300)]


def exactly(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    return reference(squared_relu(reference(x, up, counts), weights), down, counts)


def integers(*shape: int, seed: int, bits: int = 4) -> Tensor:
    """Return integers of so many bits and a sign, the same ones each time."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**bits) + 1, 2**bits, shape, generator=g).float()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_products_of_integers_are_exact(counts: list[int], widths: tuple[int, int]):
    inner, outer = widths
    x = integers(sum(counts), inner, seed=1).bfloat16()
    weight, slope = (
        integers(len(counts), outer, inner, seed=2),
        integers(sum(counts), outer, seed=3),
    )
    for leaf in (x, weight):
        leaf.requires_grad_()
    y = int16.grouped_linear(x, weight, torch.tensor(counts))
    dx, dweight = torch.autograd.grad(y, (x, weight), slope.bfloat16())
    x, weight, slope = x.detach().long(), weight.detach().long(), slope.long()
    groups = list(zip(x.split(counts), slope.split(counts), weight, strict=True))
    # sums of at most 300 products of 2^8: exact in float32, rounded once to bfloat16
    assert torch.equal(y, torch.cat([a @ w.T for a, _, w in groups]).bfloat16())
    assert torch.equal(dx, torch.cat([d @ w for _, d, w in groups]).bfloat16())
    assert torch.equal(dweight, torch.stack([d.T @ a for a, d, _ in groups]).float())


def test_numbers_above_a_sixteenth_of_the_largest_stay_as_they_are():
    g = torch.Generator().manual_seed(0)
    # all eight binary places of bfloat16, in [1/16, 1)
    x, slope = (
        (1 / 16 + 15 / 16 * torch.rand(200, size, generator=g)).mul(0.996).bfloat16()
        for size in (130, 70)
    )
    weight = (1 / 16 + 15 / 16 * torch.rand(70, 130, generator=g)).mul(0.996).bfloat16().float()
    signs = torch.randint(2, (70, 130), generator=g) * 2 - 1
    x, weight = x.requires_grad_(), (weight * signs).requires_grad_()
    y = int16.linear(x, weight)
    _, dweight = torch.autograd.grad(y, (x, weight), slope)
    # integers are added up exactly, and 3 sums of 64 in float32
    exact = slope.double().T @ x.detach().double()
    assert ((dweight - exact).abs() <= 2**-22 * exact.abs()).all()
    wide = x.detach().double() @ weight.detach().double().T
    assert torch.equal(y, wide.float().bfloat16())


@pytest.mark.parametrize("widths", WIDTHS[1:], ids=str)
def test_other_numbers_lose_less_than_bfloat16_rounds_away(widths: tuple[int, int]):
    x, _, up, _, counts = draw_experts([20, 0, 130], *widths)
    x, up = x.bfloat16(), up.bfloat16().float()
    exact = results(reference, doubled([x, up, counts]))
    found = results(int16.grouped_linear, [x, up, counts])
    # outputs are rounded to bfloat16: half a unit of the last of eight places
    assert worst(found[:2], exact[:2]) <= 2**-8 + 2**-11
    # gradients of weights are not: both sides keep the place of 2^-12 of the largest of 64, at
    # most three times their root mean square, so 3e-4 of it is the largest rounding of one
    error = (found[2] - exact[2]).norm() / exact[2].norm()
    assert 1e-6 < error <= 3e-4


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_experts_are_the_references(counts: list[int], widths: tuple[int, int]):
    x, weights, up, down, counts = draw_experts(counts, *widths)
    x, up, down = x.bfloat16(), up.bfloat16().float(), down.bfloat16().float()
    exact = results(exactly, doubled([x, weights, up, down, counts]))
    inputs = [x, weights, up, down, counts]
    found, before = results(mlp.grouped_mlp, inputs), results(float32_mlp.grouped_mlp, inputs)
    assert [t.dtype for t in found] == [torch.bfloat16] * 2 + [torch.float32] * 3
    for ours, float_, true in zip(found, before, exact, strict=True):
        error, other = ((t.double() - true).norm() for t in (ours, float_))
        # most of it is bfloat16's; 1.12 times as much in the smallest case
        assert error <= 1.25 * other


def test_a_power_of_two_changes_no_digit():
    x, weight = integers(70, 40, seed=4, bits=7).bfloat16(), torch.randn(30, 40)
    before = results(int16.linear, [x, weight])
    for power in (-60, 60):
        found = results(int16.linear, [x * 2.0**power, weight])
        assert torch.equal(found[0], before[0] * 2.0**power)
        assert torch.equal(found[1], before[1])
        assert torch.equal(found[2], before[2] * 2.0**power)
    # numbers that float32 can't multiply become zeros, and zeros stay zeros
    for tiny in (1e-38, 0.0):
        y, dx, dweight = results(int16.linear, [(x * 0 + tiny).bfloat16(), weight * tiny])
        assert not y.any()
        assert not dx.any()
        assert torch.isfinite(dweight).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_what_it_is_added_to_alone(bad: float):
    x, weight = torch.randn(150, 40).bfloat16(), torch.randn(70, 40)
    clean = results(int16.linear, [x, weight])
    x[80, 3], weight[65, 7] = bad, bad
    y, dx, dweight = results(int16.linear, [x, weight])
    rows, outputs, inputs = torch.arange(150) == 80, torch.arange(70) == 65, torch.arange(40)
    for found, before, reached in (
        (y, clean[0], rows[:, None] | outputs),
        (dx, clean[1], (inputs == 7).expand(150, 40)),
        (dweight, clean[2], (inputs == 3).expand(70, 40)),
    ):
        assert torch.equal(~torch.isfinite(found), reached)
        assert torch.equal(found[~reached], before[~reached])


def test_the_largest_sums_fit():
    from numba import njit

    from nemotron.ops.jit.int16 import BLOCK, multiply
    from nemotron.ops.jit.int16_blocks import quantize_columns, quantize_rows
    from nemotron.ops.jit.strips import ROW

    @njit
    def product(a, b, rows, columns, c):
        strips = BLOCK // 16
        quantize_rows(a, 8 * ROW, 8, strips, rows)
        quantize_columns(b, BLOCK // 2, columns)
        multiply(rows, 8, 8, strips, columns, c, True)

    rows, columns = np.zeros(8 * 4 + 4 * 8 * 32, np.uint8), np.zeros(64 + 64 * 32, np.uint8)
    c = np.zeros((8, 16), np.float32)
    # rounded to an integer, the first is a power of two higher than itself
    for number in (2**12 - 0.25, 2**12 - 0.5, 2**12 - 1, 2**12, 4080.0):
        for sign in (1, -1):
            a, b = np.full((4, 8, 16), sign * number, np.float32), np.full((64, 16), number)
            b = b.astype(np.float32)
            product(*(t.ctypes.data for t in (a, b, rows, columns, c)))
            assert np.allclose(c, sign * 64 * number**2, rtol=2**-11, atol=0)


@pytest.mark.parametrize("kernel", [int16.grouped_linear, mlp.grouped_mlp])
def test_any_number_of_threads_and_what_ran_before_give_the_same_bits(kernel: Callable[..., Any]):
    inputs = draw_experts([0, 200, 3, 130], 272, 300)
    inputs = inputs if kernel is mlp.grouped_mlp else [inputs[0], inputs[2], inputs[4]]
    inputs[0] = inputs[0].bfloat16()
    before, found = torch.get_num_threads(), []
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        try:
            # leaves other numbers in the memory that is kept
            results(float32_mlp.grouped_mlp, draw_experts([300, threads], 64, 400))
            found.append(results(kernel, inputs))
        finally:
            torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_matrices_that_are_not_trained():
    x, weights, up, down, counts = draw_experts([20, 0, 130], 40, 24)
    x = x.bfloat16()
    whole = results(mlp.grouped_mlp, [x, weights, up, down, counts])
    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    y = mlp.grouped_mlp(*leaves, up, down, counts)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(99)).bfloat16()
    assert all(map(torch.equal, torch.autograd.grad(y, leaves, slope), whole[1:3]))
    down.requires_grad_()
    (alone,) = torch.autograd.grad(mlp.grouped_mlp(x, weights, up, down, counts), down, slope)
    assert torch.equal(alone, whole[4])
    whole = results(int16.linear, [x, up[0]])
    slope = torch.randn(150, 24, generator=torch.Generator().manual_seed(99)).bfloat16()
    for leaf in (0, 1):
        inputs = [t.clone().requires_grad_(i == leaf) for i, t in enumerate((x, up[0]))]
        (one,) = torch.autograd.grad(int16.linear(*inputs), inputs[leaf], slope)
        assert torch.equal(one, whole[1 + leaf])


def test_a_model_is_as_near_to_float32_as_in_bfloat16():
    exact = _gradients(torch.float32, {})
    products = {"linear": "numba", "grouped_mlp": "numba"}
    bf16 = _gradients(torch.bfloat16, products)
    found = _gradients(torch.bfloat16, dict.fromkeys(products, "numba_int16"))
    error, other = ((t - exact).norm() / exact.norm() for t in (found, bf16))
    assert not torch.equal(found, bf16)
    assert error <= 1.1 * other


def _gradients(dtype: torch.dtype, backends: dict[str, str]) -> Tensor:
    model = build(dtype=torch.float32)
    apply(model, OpsConfig(**backends))
    model.compute_dtype = dtype
    found = gradients(model, model(tokens(3, 70)).float().square().mean())
    return torch.cat([gradient.flatten() for gradient in found.values()])


@pytest.mark.slow
def test_a_processor_without_the_instruction_gives_the_same_bits(tmp_path: Path):
    found = []
    for features in ("of_host", "dict"):
        path = tmp_path / f"{len(found)}.pt"
        env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / str(len(found)))}
        script = _SCRIPT.format(features=features, path=path)
        subprocess.run([sys.executable, "-c", script], env=env, check=True)
        found.append(torch.load(path, weights_only=True))
    assert all(map(torch.equal, *found))


_SCRIPT = """
import torch
from llvmlite import binding
import nemotron.ops.jit.strips
of_host = binding.get_host_cpu_features
binding.get_host_cpu_features = {features}
import nemotron.ops.jit.int16
binding.get_host_cpu_features = of_host
from nemotron.ops.attention.int16 import attention
from nemotron.ops.grouped_linear.int16 import linear
g = torch.Generator().manual_seed(0)
x = torch.randn(150, 72, generator=g).bfloat16().requires_grad_()
weight = torch.randn(40, 72, generator=g).requires_grad_()
qkv = torch.randn(3, 1, 150, 2, 24, generator=g).bfloat16().requires_grad_()
found = []
for y, inputs in ((linear(x, weight), (x, weight)), (attention(*qkv, None, None), (qkv,))):
    slope = torch.randn(y.shape, generator=g).bfloat16()
    found += [y.detach(), *torch.autograd.grad(y, inputs, slope)]
torch.save(found, "{path}")
"""
