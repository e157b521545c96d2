from collections.abc import Callable

import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

pytest.importorskip("triton")

from nemotron.ops.rms_norm import gated_reference, reference
from nemotron.ops.rms_norm import gated_triton as gated
from nemotron.ops.rms_norm import triton as plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5

# rows that share a program, rows that are left over, widths below a power of 2
SHAPES = [(1, 12), (7, 200), (3, 5, 64), (2, 35, 2688)]
GATED = [((1, 12), 3), ((7, 96), 1), ((3, 5, 96), 4), ((2, 11, 1536), 3)]


def draw(shape: tuple[int, ...], count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    scale = torch.exp(torch.empty(*shape[:-1], 1).uniform_(-6, 3, generator=g))
    inputs = [torch.randn(shape, generator=g) * scale for _ in range(count)]
    return [*inputs, torch.randn(shape[-1], generator=g)]


def here(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function for tensors of a CPU, run where kernels run."""

    def call(*arguments: object) -> Tensor:
        moved = (t.to(DEVICE) if isinstance(t, Tensor) else t for t in arguments)
        return function(*moved).cpu()

    return call


def halved(inputs: list[Tensor]) -> list[Tensor]:
    """Return activations in bfloat16; the gain stays float32."""
    return [t.bfloat16() for t in inputs[:-1]] + inputs[-1:]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_is_the_references(shape: tuple[int, ...]):
    inputs = draw(shape, 1)
    exact = results(reference, doubled(inputs), EPS)
    # float32 sums of a row, and of 70 rows for the gain
    assert worst(results(here(plain.rms_norm), inputs, EPS), exact) <= 5e-6
    exact = results(reference, doubled(halved(inputs)), EPS)
    found = results(here(plain.rms_norm), halved(inputs), EPS)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    # the interpreter truncates to bfloat16
    assert worst(found, exact) <= 2**-7
    # the gain's gradient is never rounded to bfloat16
    assert worst(found[2:], exact[2:]) <= 5e-6


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_residual_goes_on_and_its_gradient_comes_back_with_the_norms(shape: tuple[int, ...]):
    def exactly(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x, reference(x, weight, eps)

    def function(*inputs: object) -> tuple[Tensor, ...]:
        return tuple(plain.residual_rms_norm(*inputs))

    inputs = draw(shape, 1)
    exact = results(exactly, doubled(inputs), EPS)
    found = results(function, [t.to(DEVICE) for t in inputs], EPS)
    assert torch.equal(found[0].cpu(), inputs[0])
    # float32 sums of a row, and of up to 15 rows for the gain
    assert worst(found, exact) <= 5e-6
    exact = results(exactly, doubled(halved(inputs)), EPS)
    found = results(function, [t.to(DEVICE) for t in halved(inputs)], EPS)
    assert [t.dtype for t in found] == [*[torch.bfloat16] * 3, torch.float32]
    # the interpreter truncates to bfloat16
    assert worst(found, exact) <= 2**-7


def test_a_residuals_gradient_is_read_where_it_lies():
    x, weight = (t.to(DEVICE).requires_grad_() for t in draw((7, 24), 1))
    slopes = torch.randn(7, 3, 24, device=DEVICE)
    residual, normed = plain.residual_rms_norm(x, weight, EPS)
    found = torch.autograd.grad([residual, normed], [x, weight], [slopes[:, 1], slopes[:, 2]])
    y = reference(x, weight, EPS)
    exact = torch.autograd.grad([x * 1, y], [x, weight], [slopes[:, 1], slopes[:, 2]])
    # float32 on both sides
    assert worst(found, [t.double() for t in exact]) <= 5e-6


@pytest.mark.parametrize(("shape", "groups"), GATED)
def test_the_gated_norm_is_the_references(shape: tuple[int, ...], groups: int):
    inputs = draw(shape, 2)
    exact = results(gated_reference, doubled(inputs), groups, EPS)
    # float32 sums of a group, and the fast exponential and division of a GPU
    assert worst(results(here(gated.gated_rms_norm), inputs, groups, EPS), exact) <= 5e-6
    exact = results(gated_reference, doubled(halved(inputs)), groups, EPS)
    found = results(here(gated.gated_rms_norm), halved(inputs), groups, EPS)
    assert [t.dtype for t in found] == [*[torch.bfloat16] * 3, torch.float32]
    # the interpreter truncates to bfloat16
    assert worst(found, exact) <= 2**-7
    assert worst(found[3:], exact[3:]) <= 5e-6


def test_a_slice_is_read_in_place():
    (y, z, weight), (y_width, z_width) = draw((2, 9, 96), 2), (128, 224)
    wide_y, wide_z = y.new_full((2, 9, y_width), torch.nan), z.new_full((2, 9, z_width), torch.nan)
    wide_y[..., 16:112], wide_z[..., :96] = y, z

    def function(wide_y: Tensor, wide_z: Tensor, weight: Tensor) -> Tensor:
        ys, zs = wide_y[..., 16:112], wide_z[..., :96]
        # a copy would have rows that touch
        assert [gated.as_rows(t).stride() for t in (ys, zs)] == [(y_width, 1), (z_width, 1)]
        normed = plain.rms_norm(ys, weight, EPS)
        return torch.cat([normed, gated.gated_rms_norm(ys, zs, weight, 3, EPS)], -1)

    def exactly(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        normed = reference(y, weight, EPS)
        return torch.cat([normed, gated_reference(y, z, weight, 3, EPS)], -1)

    result, grad_y, grad_z, grad_weight = results(here(function), [wide_y, wide_z, weight])
    found = [result, grad_y[..., 16:112], grad_z[..., :96], grad_weight]
    exact = results(exactly, doubled([y, z, weight]))
    # the same sums as above
    assert worst(found, exact) <= 5e-6


def test_any_layout_is_taken():
    y, z, weight = draw((5, 3, 40), 2)

    def function(function: Callable[..., Tensor], *rest: object) -> Callable[..., Tensor]:
        def call(*inputs: Tensor) -> Tensor:
            *activations, weight = inputs
            # channels first, and a gradient that is one number everywhere
            across = [t.mT.contiguous().mT for t in activations]
            return function(*across, weight, *rest).sum((0, 1))

        return call

    exact = results(function(reference, EPS), doubled([y, weight]))
    assert worst(results(here(function(plain.rms_norm, EPS)), [y, weight]), exact) <= 5e-6
    exact = results(function(gated_reference, 4, EPS), doubled([y, z, weight]))
    found = results(here(function(gated.gated_rms_norm, 4, EPS)), [y, z, weight])
    assert worst(found, exact) <= 5e-6


def test_a_gain_without_gradient_changes_no_other():
    y, z, weight = (t.to(DEVICE) for t in draw((7, 24), 2))

    def gradients(gain: Tensor) -> list[Tensor]:
        leaves = [y.clone().requires_grad_(), z.clone().requires_grad_()]
        both = plain.rms_norm(leaves[0], gain, EPS) + gated.gated_rms_norm(*leaves, gain, 2, EPS)
        return list(torch.autograd.grad(both.square().sum(), leaves))

    alone = gradients(weight)
    # another kernel, for which the compiler may fuse other products and sums
    assert worst(alone, [t.double() for t in gradients(weight.requires_grad_())]) <= 1e-6


def test_no_rows_give_no_rows_and_a_gain_of_zero_gradient():
    for function, count, rest in (
        (plain.rms_norm, 1, (EPS,)),
        (gated.gated_rms_norm, 2, (2, EPS)),
    ):
        result, *gradients = results(here(function), draw((2, 0, 12), count), *rest)
        assert result.shape == (2, 0, 12)
        assert torch.equal(gradients[-1], torch.zeros(12))


def test_rows_are_shared_out_once_each():
    for rows in (1, 5, 63, 64, 65, 1000, 8192):
        for height in (1, 4):
            for most in (1, 7, 264):
                programs, steps = plain.share(rows, height, most)
                assert programs <= most
                assert programs * steps * height >= rows
                # no program is left without rows
                assert (programs - 1) * steps * height < rows


def test_no_gradient_is_asked_for_and_the_numbers_are_the_same():
    y, z, weight = (t.to(DEVICE) for t in draw((7, 24), 2))
    with torch.no_grad():
        alone = plain.rms_norm(y, weight, EPS), gated.gated_rms_norm(y, z, weight, 2, EPS)
    weight.requires_grad_()
    assert torch.equal(alone[0], plain.rms_norm(y, weight, EPS))
    assert torch.equal(alone[1], gated.gated_rms_norm(y, z, weight, 2, EPS))
