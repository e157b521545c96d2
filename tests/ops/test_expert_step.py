import importlib

import pytest
import torch
from torch import Tensor

from nemotron.ops.expert_step import MOST_COPIES, expert_step, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# tokens, experts, of each token, width, width inside: fewer copies than experts and more, sizes
# that fill no block, several blocks, more rows of an expert than a turn takes
SIZES = [
    (1, 8, 3, 24, 40),
    (3, 16, 5, 136, 70),
    (8, 4, 2, 40, 24),
    (20, 3, 2, 16, 24),
    (33, 2, 1, 24, 16),
    (32, 8, 2, 130, 66),
]


def draw(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, num_experts, top_k, size, width = sizes
    g = torch.Generator().manual_seed(sum(sizes))
    x, shared = torch.randn(2, tokens, size, generator=g).to(DEVICE, dtype)
    scores = torch.rand(tokens, num_experts, generator=g)
    weights, experts = (t.to(DEVICE) for t in scores.topk(top_k, dim=1))
    up = torch.randn(num_experts, width, size, generator=g).to(DEVICE, dtype)
    down = torch.randn(num_experts, size, width, generator=g).to(DEVICE, dtype)
    return x, experts, weights, up, down, shared


def kernel(*call: Tensor | None) -> Tensor:
    pytest.importorskip("triton")
    found = importlib.import_module("nemotron.ops.expert_step.triton").expert_step(*call)
    assert isinstance(found, Tensor)
    return found


def doubled(call: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in call]


def far(found: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(found).all()
    return ((found.double() - exact.double()).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_the_references(sizes: tuple[int, ...]):
    call = draw(sizes)
    # sums of at most 136 products in float32
    assert far(kernel(*call), reference(*doubled(call))) <= 2e-6
    assert far(kernel(*call[:5], None), reference(*doubled(call[:5]), None)) <= 2e-6


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_bfloat16_is_rounded_inside_and_at_the_end(sizes: tuple[int, ...]):
    call = draw(sizes, torch.bfloat16)
    found = kernel(*call)
    assert found.dtype == torch.bfloat16
    # the interpreter truncates to bfloat16, between the projections, too
    assert far(found, reference(*doubled(call))) <= 2**-6


@pytest.mark.parametrize("function", [kernel, reference])
def test_it_is_the_experts_one_by_one(function):
    x, experts, weights, up, down, shared = draw(SIZES[1])
    rows = []
    for token, chosen, factors, more in zip(x, experts, weights, shared, strict=True):
        parts = [
            w * (down[e].double() @ (up[e].double() @ token.double()).clamp(min=0) ** 2)
            for e, w in zip(chosen.tolist(), factors.tolist(), strict=True)
        ]
        rows.append(sum(parts) + more.double())
    assert far(function(x, experts, weights, up, down, shared), torch.stack(rows)) <= 2e-6


def test_experts_that_nobody_chose_are_not_read():
    x, experts, weights, up, down, shared = draw(SIZES[0])
    usual = kernel(x, experts, weights, up, down, shared)
    others = [e for e in range(up.shape[0]) if e not in experts.flatten().tolist()]
    assert others
    up[others] = down[others] = torch.nan
    assert torch.equal(kernel(x, experts, weights, up, down, shared), usual)


def test_a_token_has_the_same_bits_in_any_company():
    x, experts, weights, up, down, shared = draw(SIZES[2])
    together = kernel(x, experts, weights, up, down, shared)
    for k in range(x.shape[0]):
        one = slice(k, k + 1)
        alone = kernel(x[one], experts[one], weights[one], up, down, shared[one])
        assert torch.equal(alone, together[one])


def test_a_bad_token_spoils_no_other():
    x, experts, weights, up, down, shared = draw(SIZES[2])
    usual = kernel(x, experts, weights, up, down, shared)
    x[3] = torch.nan
    found = kernel(x, experts, weights, up, down, shared)
    assert found[3].isnan().all()
    rest = [k for k in range(x.shape[0]) if k != 3]
    assert torch.equal(found[rest], usual[rest])


def test_experts_of_a_token_are_added_in_their_order():
    # 1 disappears beside 2 ** 24, so only one order gives this sum
    x = torch.ones(1, 1, device=DEVICE)
    up = torch.ones(4, 1, 1, device=DEVICE)
    down = torch.tensor([1.0, 1.0, 2.0**24, -(2.0**24)], device=DEVICE).view(4, 1, 1)
    weights = torch.ones(1, 4, device=DEVICE)
    for order, expected in (([2, 0, 1, 3], 0), ([0, 2, 1, 3], 0), ([0, 1, 2, 3], 2)):
        experts = torch.tensor([order], device=DEVICE)
        assert kernel(x, experts, weights, up, down, None).item() == expected


def test_a_slice_of_wider_rows_is_read_in_place():
    x, *rest, shared = draw(SIZES[1])
    wide, wider = (F.new_full((3, 200), torch.nan) for F in (x, shared))
    wide[:, 16 : 16 + 136] = x
    wider[:, 8 : 8 + 136] = shared
    found = kernel(wide[:, 16 : 16 + 136], *rest, wider[:, 8 : 8 + 136])
    assert torch.equal(found, kernel(x, *rest, shared))


def test_no_tokens_give_no_rows():
    x, experts, weights, up, down, shared = draw(SIZES[0])
    assert kernel(x[:0], experts[:0], weights[:0], up, down, shared[:0]).shape == (0, 24)


def test_too_many_copies_are_left_to_others():
    reason = expert_step.backend("triton").limit
    assert reason is not None
    assert reason(MOST_COPIES) is None
    assert reason(MOST_COPIES + 1) == "takes 512 copies of tokens at most, not 513"
    if DEVICE == "cpu":
        assert not expert_step.takes(torch.zeros(1), sizes=(6,))


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device(no_waits):
    call = draw(SIZES[0], torch.bfloat16)
    kernel(*call)  # compiles
    with no_waits():
        kernel(*call)
