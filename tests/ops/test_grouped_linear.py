import pytest
import torch
from against_reference import doubled, results, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron.device import cpu_multiplies_bfloat16
from nemotron.ops.grouped_linear import grouped_linear, grouped_mm, loop, reference, row_multiple


def draw(counts: list[int], inner: int = 5, outer: int = 7) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts), inner, generator=g)
    return [x, torch.randn(len(counts), outer, inner, generator=g), torch.tensor(counts)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_any_counts_agree_and_no_row_is_dropped(counts: list[int]):
    inputs = draw(counts)
    x, weight, _ = doubled(inputs)
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    by_row = torch.einsum("rk,rnk->rn", x, weight[experts])
    assert worst([reference(x, weight, inputs[2])], [by_row]) <= 1e-13
    exact = results(reference, doubled(inputs))
    assert worst(results(loop, doubled(inputs)), exact) <= 1e-13
    assert worst(results(loop, inputs), exact) <= 5e-6


def test_experts_without_rows_get_a_gradient_of_zero():
    inputs = draw([0, 3, 0, 2, 0])
    weight = results(loop, inputs)[2]
    assert [bool(matrix.any()) for matrix in weight] == [False, True, False, True, False]


def test_bfloat16_products_round_their_result():
    x, weight, counts = draw([64, 0, 31, 33], inner=48, outer=40)
    inputs = [x.bfloat16(), weight.bfloat16(), counts]
    exact = results(reference, doubled(inputs))
    assert worst(results(grouped_linear, inputs), exact) <= 2**-8


def test_rows_are_rounded_up_only_where_shapes_are_compiled():
    narrow = row_multiple(torch.zeros(1, dtype=torch.bfloat16))
    assert narrow == (64 if cpu_multiplies_bfloat16() else 1)
    assert row_multiple(torch.zeros(1)) == 1
    assert row_multiple(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == 1


@pytest.mark.gpu
def test_the_grouped_product_on_a_gpu_agrees():
    x, weight, counts = draw([64, 0, 31, 33], inner=48, outer=40)
    inputs = [x.bfloat16(), weight.bfloat16(), counts]
    exact = results(reference, doubled(inputs))
    found = results(grouped_mm, [t.cuda() for t in inputs])
    assert worst([t.cpu() for t in found], exact) <= 2**-8
