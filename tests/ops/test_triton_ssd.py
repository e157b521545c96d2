"""The Triton kernels of the scan: in the interpreter on a CPU, compiled on a GPU."""

from collections.abc import Iterator

import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.ops.registry import Call
from nemotron.ops.ssd import reference, ssd

pytest.importorskip("triton", reason="triton is not installed")

from nemotron.ops.ssd import triton as kernels
from tests.support.cases import further

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

NARROW = (0, 3, 4)  # x, B, C


def draw(
    rows: int,
    length: int,
    heads: int = 2,
    groups: int = 1,
    width: int = 16,
    state_size: int = 32,
    state: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor | None]:
    """x, dt, A, B, C, D, initial state; time steps and decays over their whole useful range."""
    g = torch.Generator().manual_seed(length)
    inputs = [
        torch.randn(rows, length, heads, width, generator=g),
        torch.exp(torch.empty(rows, length, heads).uniform_(-9, 1, generator=g)),
        -torch.exp(torch.empty(heads).uniform_(-1, 3, generator=g)),
        torch.randn(rows, length, groups, state_size, generator=g),
        torch.randn(rows, length, groups, state_size, generator=g),
        torch.randn(heads, generator=g),
        torch.randn(rows, heads, width, state_size, generator=g) if state else None,
    ]
    return [t.to(dtype) if i in NARROW else t for i, t in enumerate(inputs)]


def documents(rows: int, length: int, often: float = 0.05) -> Tensor:
    g = torch.Generator().manual_seed(length)
    return (torch.rand(rows, length, generator=g) < often).int().cumsum(1).int()


def error(inputs: list[Tensor | None], ids: Tensor | None) -> float:
    """Return the largest difference from the recurrence in float64, all gradients included."""
    exact = results(reference, doubled(inputs), ids)
    moved = [t.to(DEVICE) if t is not None else None for t in [*inputs, ids]]

    def scan(*leaves: Tensor | None) -> tuple[Tensor, Tensor]:
        y, final_state = kernels.ssd(*leaves)
        return y.cpu(), final_state.cpu()

    return worst([t.cpu() for t in results(scan, moved)], exact)


@pytest.fixture(params=[1, 12], ids=["one_segment", "segments"])
def segments(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cut short rows into segments as if there were more programs to fill."""
    with kernels.SEGMENTS.forced({"programs": request.param, "shortest": 1}):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("segments")
@pytest.mark.parametrize("with_documents", [further(False), True])
def test_float32_is_the_recurrence_to_rounding(with_documents: bool):
    inputs = draw(2, 45)
    ids = documents(2, 45) if with_documents else None
    # sums of some hundred float32 products, and a GPU's exp2 is right to 2^-22
    assert error(inputs, ids) <= 5e-6


@pytest.mark.usefixtures("segments")
@pytest.mark.parametrize("with_documents", [further(False), True])
def test_bfloat16_inputs_cost_no_more_than_bfloat16_products(with_documents: bool):
    inputs = draw(2, 140, dtype=torch.bfloat16)
    ids = documents(2, 140) if with_documents else None
    # results are rounded to 8 bits (cut off in the interpreter: 2^-7), and so are, on a GPU, the
    # operands of two products on the way
    assert error(inputs, ids) <= 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 16, 65])
def test_any_length_of_a_row_agrees(length: int, dtype: torch.dtype):
    inputs = draw(1, length, width=32, state_size=16, state=False, dtype=dtype)
    assert error(inputs, None) <= (5e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.slow
def test_several_groups_and_heads_keep_to_themselves():
    inputs = draw(1, 40, heads=6, groups=3, state_size=16)
    assert error(inputs, documents(1, 40)) <= 5e-6


@pytest.mark.slow
def test_heads_of_a_group_may_be_parted_among_programs():
    inputs = draw(1, 20, heads=6, groups=3, state_size=16)
    with kernels.GRADIENTS_OF_HEADS.forced({"warps": 8, "stages": 1, "parts": 4}):
        assert error(inputs, documents(1, 20)) <= 5e-6


def test_slices_of_wider_tensors_are_read_in_place():
    x, dt, A, B, C, D, state = draw(2, 40, groups=2)
    # as in the mixer: x, B and C are channels of one tensor; heads first in dt is no harm
    channels = torch.cat([t.flatten(2) for t in (x, B, C)], dim=-1).to(DEVICE)
    slices = [
        part.unflatten(-1, t.shape[2:]).requires_grad_()
        for part, t in zip(channels.split([32, 64, 64], dim=-1), (x, B, C), strict=True)
    ]
    heads_first = dt.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE).requires_grad_()
    others = [t.to(DEVICE).requires_grad_() for t in (A, D, state)]
    leaves = [slices[0], heads_first, others[0], *slices[1:], *others[1:]]
    y, final_state = kernels.ssd(*leaves, None)
    exact = results(reference, doubled([x, dt, A, B, C, D, state]), None)
    g = torch.Generator().manual_seed(99)
    dy, dfinal = (torch.randn(t.shape, generator=g).bfloat16().float() for t in (y, final_state))
    # the gradient of y is a slice as well, of other strides
    wide = torch.zeros(*dy.shape[:3], dy.shape[3] + 5)
    wide[..., :-5] = dy
    gradients = torch.autograd.grad(
        [y, final_state], leaves, [wide.to(DEVICE)[..., :-5], dfinal.to(DEVICE)]
    )
    found = [t.detach().cpu() for t in (y, final_state, *gradients)]
    assert worst(found, exact) <= 5e-6


def test_a_gradient_of_one_output_alone_is_enough():
    inputs = [t.to(DEVICE).requires_grad_() for t in draw(1, 20)]
    both = kernels.ssd(*inputs, None)
    exact = reference(*(t.double() for t in inputs), None)
    for ours, true in zip(both, exact, strict=True):
        wanted = [t for t in inputs if t is not inputs[5] or ours is both[0]]
        found = torch.autograd.grad(ours.sum(), wanted, retain_graph=True)
        theirs = torch.autograd.grad(true.sum(), wanted, retain_graph=True, allow_unused=True)
        pairs = [(a, b) for a, b in zip(found, theirs, strict=True) if b is not None]
        assert worst(*([t.detach() for t in side] for side in zip(*pairs, strict=True))) <= 5e-6


def test_a_token_without_a_time_step_still_has_a_gradient():
    inputs = draw(1, 20)
    inputs[1][:, 5:9] = 0
    assert error(inputs, None) <= 5e-6


def test_extreme_decays_neither_overflow_nor_lose_the_gradient():
    inputs = draw(1, 48)
    inputs[1] = torch.cat([torch.full((1, 24, 2), 50.0), torch.full((1, 24, 2), 1e-6)], dim=1)
    assert error(inputs, None) <= 1e-5


def test_an_initial_state_belongs_to_document_zero():
    inputs = [t.to(DEVICE) for t in draw(1, 20)]
    without = [*inputs[:6], None]
    ones = torch.ones(1, 20, dtype=torch.int32, device=DEVICE)
    for with_state, alone in zip(
        kernels.ssd(*inputs, ones), kernels.ssd(*without, ones), strict=True
    ):
        assert torch.equal(with_state, alone)
    zeros = torch.zeros(1, 20, dtype=torch.int64, device=DEVICE)
    for same, plain in zip(kernels.ssd(*inputs, zeros), kernels.ssd(*inputs, None), strict=True):
        assert torch.equal(same, plain)


def test_no_gradient_of_x_B_or_C_crosses_into_another_document():
    inputs = [t.to(DEVICE).requires_grad_() for t in draw(1, 40)]
    ids = (torch.arange(40, device=DEVICE) >= 21).int()[None]
    y, _ = kernels.ssd(*inputs, ids)
    y[:, 21:].sum().backward()
    for position in NARROW:
        assert not inputs[position].grad[:, :21].any()
    assert not inputs[6].grad.any()


@pytest.mark.slow
def test_two_calls_give_the_same_bits():
    inputs = draw(1, 40)
    moved = [t.to(DEVICE) for t in inputs]
    first, second = (results(kernels.ssd, moved, None) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_the_kernels_are_chosen_for_sizes_that_they_can_cut():
    on_gpu = ssd.backend("triton")
    assert on_gpu.unfit(Call("cuda", torch.bfloat16, frozenset({"documents"}))) is None
    assert on_gpu.unfit(Call("cuda", torch.bfloat16, sizes=(64, 128))) is None
    assert on_gpu.unfit(Call("cuda", torch.bfloat16, sizes=(48, 128))) == (
        "takes heads and states of 16, 32, 64, 128, not of 48 and 128"
    )
    assert "float64" in on_gpu.unfit(Call("cuda", torch.float64))
