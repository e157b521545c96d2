from collections.abc import Callable

import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.ops.squared_relu import blocked, reference, squared_relu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# rows that share a program, rows that are left over, columns in one block and in several
SHAPES = [(1, 12), (7, 200), (3, 5, 40), (9, 1856)]


@pytest.fixture(params=["triton", "blocked"])
def function(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    if request.param == "blocked":
        return blocked
    pytest.importorskip("triton")
    from nemotron.ops.squared_relu import triton

    def here(x: Tensor, weight: Tensor | None) -> Tensor:
        return triton.squared_relu(
            x.to(DEVICE), None if weight is None else weight.to(DEVICE)
        ).cpu()

    return here


def draw(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=g), torch.randn(*shape[:-1], 1, generator=g)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_references(
    function: Callable[..., Tensor], shape: tuple[int, ...], weighted: bool
):
    x, weight = draw(shape)
    inputs = [x, weight if weighted else None]
    exact = results(reference, doubled(inputs))
    # float32 products, and the sum of a row whose terms may cancel
    assert worst(results(function, inputs), exact) <= 1e-5
    inputs[0] = x.bfloat16()
    exact = results(reference, doubled(inputs))
    found = results(function, inputs)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32][: len(found)]
    # the interpreter truncates to bfloat16
    assert worst(found, exact) <= 2**-7
    # never rounded to bfloat16, but a sum whose terms may cancel
    assert not weighted or worst(found[2:], exact[2:]) <= 1e-5


def test_the_reference_is_the_formula():
    x, weight = draw((5, 24))

    def formula(x: Tensor, weight: Tensor | None) -> Tensor:
        return x.clamp(min=0) ** 2 * (1 if weight is None else weight)

    for inputs in ([x, weight], [x, None]):
        exact = results(formula, doubled(inputs))
        assert worst(results(reference, doubled(inputs)), exact) <= 1e-15


def test_a_slice_is_read_in_place(function: Callable[..., Tensor]):
    x, weight = draw((6, 40))
    wide = x.new_full((6, 72), torch.nan)
    wide[:, 16:56] = x

    def sliced(wide: Tensor, weight: Tensor) -> Tensor:
        return function(wide[:, 16:56], weight)

    result, grad, grad_weight = results(sliced, [wide, weight])
    exact = results(reference, doubled([x, weight]))
    # float32 products, and the sum of a row whose terms may cancel
    assert worst([result, grad[:, 16:56], grad_weight], exact) <= 1e-5


def test_a_gradient_that_is_one_number_everywhere_is_taken(function: Callable[..., Tensor]):
    x, weight = draw((6, 40))

    def total(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: function(*inputs).sum()

    exact = results(total(reference), doubled([x, weight]))
    # the sum of 240 numbers, too
    assert worst(results(total(function), [x, weight]), exact) <= 5e-6


def test_a_bad_number_stays_one(function: Callable[..., Tensor]):
    x, weight = draw((2, 8))
    x[1, 3] = torch.nan
    for gain in (weight, None):
        assert function(x, gain).isnan().sum() == 1


def test_no_rows_give_no_rows(function: Callable[..., Tensor]):
    x, weight = draw((0, 12))
    assert [t.shape for t in results(function, [x, weight])] == [(0, 12), (0, 12), (0, 1)]


def test_a_cpu_takes_the_blocked_one():
    x, weight = draw((5, 24))
    assert torch.equal(squared_relu(x), blocked(x, None))
    assert torch.equal(squared_relu(x, weight), blocked(x, weight))
