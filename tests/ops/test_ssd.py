import pytest
import torch
from against_reference import doubled, results, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron.ops.ssd import chunked, reference, ssd

# one token, below, at and around one chunk of 64, several chunks with a remainder
LENGTHS = [1, 2, 63, 64, 65, 127, 129, 200]


def draw(
    rows: int, length: int, heads: int = 4, groups: int = 2, seed: int = 0, state: bool = True
) -> list[Tensor | None]:
    """x, dt, A, B, C, D, initial state; time steps and decays over their whole useful range."""
    g = torch.Generator().manual_seed(seed)
    dt = torch.exp(torch.empty(rows, length, heads).uniform_(-9, 1, generator=g))
    return [
        torch.randn(rows, length, heads, 6, generator=g),
        dt,
        -torch.exp(torch.empty(heads).uniform_(-1, 3, generator=g)),
        torch.randn(rows, length, groups, 5, generator=g),
        torch.randn(rows, length, groups, 5, generator=g),
        torch.randn(heads, generator=g),
        torch.randn(rows, heads, 6, 5, generator=g) if state else None,
    ]


def documents(rows: int, length: int, seed: int, often: float = 0.1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    ends = (torch.rand(rows, length, generator=g) < often).int()
    return ends.cumsum(1).int()


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_are_the_recurrence_to_float64(length: int, with_documents: bool):
    inputs = doubled(draw(2, length))
    ids = documents(2, length, seed=length) if with_documents else None
    found = results(chunked.ssd, inputs, ids)
    # all gradients, those through the final state included
    assert worst(found, results(reference, inputs, ids)) <= 1e-12


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", [1, 65, 200, 700])
def test_float32_stays_close_to_the_float64_recurrence(length: int, with_documents: bool):
    inputs = draw(2, length, seed=length)
    ids = documents(2, length, seed=length) if with_documents else None
    exact = results(reference, doubled(inputs), ids)
    assert worst(results(chunked.ssd, inputs, ids), exact) <= 1e-5


def test_bfloat16_inputs_cost_no_more_than_bfloat16_products():
    narrow = [0, 3, 4]  # x, B, C
    inputs = [t.bfloat16() if i in narrow else t for i, t in enumerate(draw(2, 130))]
    exact = results(reference, doubled(inputs), None)
    # factors and products are rounded to 8 bits, 2^-9 each time, as inside mamba-ssm's kernels;
    # two or three such roundings meet in one entry
    assert worst(results(chunked.ssd, inputs, None), exact) <= 2**-7


def test_the_gradient_of_the_skip_adds_up_exact_products():
    inputs = [t if t is None else t.bfloat16() for t in draw(2, 4000, state=False)]
    inputs[1:3] = (t.float() for t in inputs[1:3])
    dD = results(chunked.ssd, [*inputs[:5], draw(2, 1)[5], None], None)[-1]
    x, generator = inputs[0].double(), torch.Generator().manual_seed(99)
    dy = torch.randn(x.shape, generator=generator).bfloat16().double()
    # sums of float32; rounding each product to bfloat16 first would give 4e-3 of the largest
    assert worst([dD], [(dy * x).sum((0, 1, 3))]) <= 1e-5


def test_extreme_decays_neither_overflow_nor_lose_the_gradient():
    inputs = draw(1, 200)
    inputs[1] = torch.cat([torch.full((1, 100, 4), 50.0), torch.full((1, 100, 4), 1e-6)], dim=1)
    exact = results(reference, doubled(inputs), None)
    assert worst(results(chunked.ssd, inputs, None), exact) <= 1e-5


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 140),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape_agrees(rows: int, length: int, heads: tuple[int, int], state: bool, seed: int):
    inputs = doubled(draw(rows, length, *heads, seed=seed, state=state))
    ids = documents(rows, length, seed)
    found = results(chunked.ssd, inputs, ids)
    # dA of a single head is one sum over all tokens, in which two digits may cancel
    assert worst(found, results(reference, inputs, ids)) <= (1e-12 if heads[0] > 1 else 1e-10)


@pytest.mark.parametrize("function", [chunked.ssd, reference])
@pytest.mark.parametrize("cut", [1, 40, 64, 100])
def test_changing_document_one_leaves_document_two_bit_equal(function, cut: int):
    inputs = draw(1, 150, state=False)
    ids = (torch.arange(150) >= cut).int()[None]
    other = [t.clone() if t is not None else None for t in inputs]
    for position in (0, 1, 3, 4):
        other[position][:, :cut] = other[position][:, :cut].flip(1) * 1.5 + 0.1
    one, two = (function(*tensors, ids) for tensors in (inputs, other))
    assert not torch.equal(one[0][:, :cut], two[0][:, :cut])
    assert torch.equal(one[0][:, cut:], two[0][:, cut:])
    assert torch.equal(one[1], two[1])


def test_no_gradient_crosses_into_another_document():
    inputs = [t.requires_grad_() if t is not None else None for t in draw(1, 100)]
    ids = (torch.arange(100) >= 37).int()[None]
    y, _ = chunked.ssd(*inputs, ids)
    y[:, 37:].sum().backward()
    for position in (0, 1, 3, 4):
        assert not inputs[position].grad[:, :37].any()
    assert not inputs[6].grad.any()


def test_an_initial_state_belongs_to_document_zero():
    inputs = draw(1, 20)
    without = [*inputs[:6], None]
    ones = torch.ones(1, 20, dtype=torch.int32)
    assert torch.equal(chunked.ssd(*inputs, ones)[0], chunked.ssd(*without, ones)[0])
    zeros = torch.zeros(1, 20, dtype=torch.int32)
    assert torch.equal(chunked.ssd(*inputs, zeros)[0], chunked.ssd(*inputs, None)[0])


def test_two_halves_with_the_state_passed_on_are_the_whole():
    x, dt, A, B, C, D, state = doubled(draw(2, 150))
    y, final = ssd(x, dt, A, B, C, D, initial_state=state, return_final_state=True)
    first, middle = ssd(
        x[:, :70], dt[:, :70], A, B[:, :70], C[:, :70], D,
        initial_state=state, return_final_state=True,
    )  # fmt: skip
    second, last = ssd(
        x[:, 70:], dt[:, 70:], A, B[:, 70:], C[:, 70:], D,
        initial_state=middle, return_final_state=True,
    )  # fmt: skip
    assert worst([torch.cat([first, second], 1), last], [y, final]) <= 1e-13


def test_views_that_are_not_contiguous_give_the_same():
    inputs = draw(2, 70)
    views = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    found = results(chunked.ssd, views, None)
    assert worst(found, results(chunked.ssd, doubled(inputs), None)) <= 1e-5


@pytest.mark.parametrize("reverse", [False, True])
def test_running_sums_by_product_are_those_by_addition(reverse: bool):
    a = torch.randn(2, 3, 64, 5, generator=torch.Generator().manual_seed(0)).double()
    ids = documents(2, 3 * 64, seed=1).unflatten(1, (3, 64))
    for numbers in (None, ids):
        found = chunked._running_sum_by_product(a, numbers, reverse)
        assert worst([found], [chunked._running_sum(a, numbers, reverse)]) <= 1e-14


@pytest.mark.gpu
@pytest.mark.parametrize("with_documents", [False, True])
def test_the_chunks_run_in_deterministic_mode_on_a_gpu(with_documents: bool):
    inputs = draw(2, 200)
    ids = documents(2, 200, seed=3) if with_documents else None
    exact = results(reference, doubled(inputs), ids)
    on_gpu = [t.cuda() if t is not None else None for t in inputs]
    found = results(chunked.ssd, on_gpu, ids.cuda() if ids is not None else None)
    assert worst([t.cpu() for t in found], exact) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("with_documents", [False, True])
def test_the_kernels_of_mamba_ssm_agree(with_documents: bool):
    pytest.importorskip("mamba_ssm", reason="mamba-ssm is not installed")
    from nemotron.ops.ssd import mamba_ssm

    g = torch.Generator().manual_seed(0)
    rows, length, heads, groups, width, state = 2, 300, 8, 2, 64, 128
    inputs = [
        torch.randn(rows, length, heads, width, generator=g).bfloat16(),
        torch.rand(rows, length, heads, generator=g) * 0.2,
        -torch.exp(torch.rand(heads, generator=g) * 2),
        torch.randn(rows, length, groups, state, generator=g).bfloat16(),
        torch.randn(rows, length, groups, state, generator=g).bfloat16(),
        torch.randn(heads, generator=g),
    ]
    ids = documents(rows, length, seed=1) if with_documents else None
    exact = results(lambda *t: reference(*t[:6], None, t[6])[0], [*doubled(inputs), ids])
    on_gpu = [t.cuda() if t is not None else None for t in [*inputs, ids]]
    found = results(lambda *t: mamba_ssm.ssd(*t[:6], None, t[6])[0], on_gpu)
    # bfloat16 products of chunks inside the kernel
    assert worst([t.cpu() for t in found], exact) <= 2e-2
