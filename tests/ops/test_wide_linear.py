import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.ops.linear import split, wide_linear
from nemotron.ops.linear import wide_reference as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(rows: int, weight_dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 200, generator=g).bfloat16()
    # numbers of many sizes, with all digits of float32
    weight = torch.randn(24, 200, generator=g) * torch.rand(24, 1, generator=g).exp()
    return [x.to(DEVICE), weight.to(DEVICE, weight_dtype)]


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_float32(rows: int, weight_dtype: torch.dtype):
    inputs = draw(rows, weight_dtype)
    exact = results(reference, doubled(inputs))
    y, grad_x, grad_weight = results(split.wide_linear, inputs)
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (
        torch.float32,
        torch.bfloat16,
        weight_dtype,
    )
    assert worst([y], exact[:1]) <= 1e-6
    # half a unit in the last place of bfloat16
    assert worst([grad_x], exact[1:2]) <= 2**-8
    assert worst([grad_weight], exact[2:]) <= (1e-6 if weight_dtype == torch.float32 else 2**-8)


def test_the_gradient_has_no_error_before_it_is_rounded():
    inputs = draw(64)
    _, exact, _ = results(reference, doubled(inputs))
    _, found, _ = results(split.wide_linear, inputs)
    assert (found.cpu() != exact.cpu().bfloat16()).float().mean() <= 1e-2


def test_three_parts_are_the_number():
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    for dim in (0, 1):
        parts = split._three_parts(x, dim).double()
        assert torch.equal(parts.sum(dim), x.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_result_is_float32_or_that_of_a_wider_weight(
    dtype: torch.dtype, weight_dtype: torch.dtype
):
    x, weight = draw(3, weight_dtype)
    y = wide_linear(x.to(dtype), weight)
    assert y.dtype == torch.promote_types(weight_dtype, torch.float32)
