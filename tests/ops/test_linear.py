import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.ops import linear as op
from nemotron.ops.linear import float32_gradient, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    rows = torch.randn(*shape[:-1], generator=g).bfloat16()
    return [rows, torch.randn(shape[-1], shape[-2], generator=g).bfloat16().float()]


@pytest.mark.parametrize("shape", [(1, 8, 16), (3, 5, 24, 8), (2, 64, 48, 40)])
def test_the_weight_gradient_is_not_rounded_to_bfloat16(shape: tuple[int, ...]):
    inputs = draw(*shape)
    y, grad_x, grad_weight = results(float32_gradient.linear, [t.to(DEVICE) for t in inputs])
    exact = results(reference, doubled(inputs))
    # the outputs and the gradient of x are bfloat16: half a unit in the last of 8 bits
    assert worst([y.cpu(), grad_x.cpu()], exact[:2]) <= 2**-8
    # products of bfloat16 are exact in float32, their sums are not
    assert grad_weight.dtype == torch.float32
    assert worst([grad_weight.cpu()], exact[2:]) <= 1e-5


def test_an_input_that_wants_no_gradient_costs_no_product():
    x, weight = (t.to(DEVICE) for t in draw(3, 16, 8))
    float32_gradient.linear(x, weight.requires_grad_()).sum().backward()
    assert weight.grad is not None
    assert x.grad is None


def test_matrices_that_are_gathered_in_bfloat16_keep_their_dtype_in_the_gradient():
    x, weight = draw(3, 16, 8)
    narrow = weight.bfloat16().requires_grad_()
    op.linear(x, narrow).sum().backward()
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
