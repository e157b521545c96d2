import importlib

import pytest
import torch
from torch import Tensor

from nemotron.ops.router_step import MOST_TOKENS, reference, router_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# tokens, experts, of each token, width: sizes that fill no block, and several blocks
SIZES = [(1, 8, 3, 24), (5, 70, 6, 300), (17, 16, 1, 130), (32, 5, 5, 40)]


def draw(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    tokens, num_experts, _, size = sizes
    g = torch.Generator().manual_seed(sum(sizes))
    x = torch.randn(tokens, size, generator=g).to(DEVICE, dtype)
    weight = torch.randn(num_experts, size, generator=g).to(DEVICE) / size**0.5
    return x, weight, torch.randn(num_experts, generator=g).to(DEVICE) / 4


def kernel(*call: object) -> tuple[Tensor, ...]:
    pytest.importorskip("triton")
    found = importlib.import_module("nemotron.ops.router_step.triton").router_step(*call)
    assert [t.dtype for t in found] == [torch.float32, torch.int64, torch.float32, torch.int64]
    return found


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_references(sizes: tuple[int, ...], normalize: bool, dtype: torch.dtype):
    x, weight, bias = draw(sizes, dtype)
    settings = sizes[2], 2.5, normalize
    exact = reference(x.double(), weight.double(), bias.double(), *settings)
    found = kernel(x, weight, bias, *settings)
    assert torch.equal(found[1], exact[1])
    # the weight is not rounded where x is bfloat16, either
    assert torch.equal(found[3], exact[3])
    assert found[3].sum() == sizes[0] * sizes[2]
    for ours, true in zip(found[:3:2], exact[:3:2], strict=True):
        assert torch.allclose(ours.double(), true, rtol=0, atol=2e-6)


@pytest.mark.parametrize("function", [kernel, reference])
def test_the_bias_chooses_and_does_not_weigh(function):
    x, weight = torch.ones(1, 2, device=DEVICE), torch.tensor([[1.0, 0], [0, 2], [0, 0]])
    weight, bias = weight.to(DEVICE), torch.tensor([0.0, 0, 9]).to(DEVICE)
    scores, experts, weights, counts = function(x, weight, bias, 2, 3.0, True)
    assert experts.tolist() == [[2, 1]]
    assert counts.tolist() == [0, 1, 1]
    high = 1 / (1 + torch.tensor(-2.0).exp().item())
    assert weights[0].tolist() == pytest.approx([3 * 0.5 / (0.5 + high), 3 * high / (0.5 + high)])
    assert scores[0].tolist() == pytest.approx(
        [1 / (1 + torch.tensor(-1.0).exp().item()), high, 0.5]
    )


def test_of_equal_scores_the_first_are_chosen():
    x, weight, bias = draw(SIZES[0])
    assert kernel(x, weight * 0, bias * 0, 3, 1.0, False)[1].tolist() == [[0, 1, 2]]


def test_a_bad_token_chooses_experts_that_exist_and_spoils_no_other():
    x, weight, bias = draw(SIZES[1])
    usual = kernel(x, weight, bias, 6, 1.0, True)
    x[3] = torch.nan
    found = kernel(x, weight, bias, 6, 1.0, True)
    assert found[1].min() >= 0
    assert found[1].max() < 70
    assert len(set(found[1][3].tolist())) == 6
    rest = [0, 1, 2, 4]
    for now, before in zip(found[:3], usual[:3], strict=True):
        assert torch.equal(now[rest], before[rest])


def test_a_token_has_the_same_bits_in_any_company():
    x, weight, bias = draw(SIZES[2])
    together = kernel(x, weight, bias, 1, 1.0, False)
    for k in (0, 16):
        alone = kernel(x[k : k + 1], weight, bias, 1, 1.0, False)
        assert all(torch.equal(a, b[k : k + 1]) for a, b in zip(alone[:3], together, strict=False))


def test_a_slice_of_wider_rows_is_read_in_place():
    x, weight, bias = draw(SIZES[1])
    wide = x.new_full((5, 400), torch.nan)
    wide[:, 50:350] = x
    found = kernel(wide[:, 50:350], weight, bias, 6, 1.0, True)
    assert all(map(torch.equal, found, kernel(x, weight, bias, 6, 1.0, True)))


def test_no_tokens_give_no_rows():
    x, weight, bias = draw(SIZES[0])
    assert [t.shape for t in kernel(x[:0], weight, bias, 3, 1.0, True)] == [
        (0, 8),
        (0, 3),
        (0, 3),
        (8,),
    ]


def test_too_many_tokens_are_left_to_others():
    reason = router_step.backend("triton").limit
    assert reason is not None
    assert reason(MOST_TOKENS) is None
    assert reason(MOST_TOKENS + 1) == "takes 64 tokens at most, not 65"


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device(no_waits):
    x, weight, bias = draw(SIZES[1], torch.bfloat16)
    kernel(x, weight, bias, 6, 1.0, True)  # compiles
    with no_waits():
        kernel(x, weight, bias, 6, 1.0, True)
