import importlib
from collections.abc import Iterator

import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.ops import linear_cross_entropy as package
from nemotron.ops.linear_cross_entropy import chunked, reference

pytest.importorskip("triton")
kernels = importlib.import_module("nemotron.ops.linear_cross_entropy.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(tokens: int, dtype: torch.dtype, width: int = 24, vocab: int = 117) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    labels = torch.randint(vocab, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < 0.2] = -100
    labels[-1] = vocab - 1
    return [
        torch.randn(tokens, width, generator=g).to(DEVICE, dtype),
        torch.randn(vocab, width, generator=g).to(DEVICE),
        labels.to(DEVICE),
    ]


@pytest.fixture
def blocks_of_64() -> Iterator[None]:
    """Let a row be more than one block, the last of them not full."""
    with kernels.LOSSES.forced({"block": 64, "warps": 32, "stages": 2}):
        yield


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.usefixtures("blocks_of_64")
def test_losses_and_gradients_are_those_of_the_reference(
    tokens: int, weighted: bool, dtype: torch.dtype, reduction: str
):
    inputs = draw(tokens, dtype)
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weights = weights if weighted else None
    wide = None if weights is None else weights.double()
    # the operands that the products see, so that only logits and slopes are rounded
    rounded = [inputs[0], inputs[1].to(dtype), inputs[2]]
    exact = results(reference, doubled(rounded), reduction, wide)
    found = results(kernels.linear_cross_entropy, inputs, reduction, weights)
    assert [t.dtype for t in found] == [torch.float32, dtype, torch.float32]
    # logits up to 30 have an error of 0.06 in bfloat16, and losses and slopes follow them
    assert worst(found, exact) <= (2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_several_chunks_make_one_sum(reduction: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 128)
    inputs = draw(131, torch.float32, vocab=33)
    exact = results(reference, doubled(inputs), reduction)
    assert worst(results(kernels.linear_cross_entropy, inputs, reduction), exact) <= 2e-6


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bfloat16_is_as_exact_as_the_form_of_torch(reduction: str):
    inputs = draw(40, torch.bfloat16)
    rounded = [inputs[0], inputs[1].bfloat16(), inputs[2]]
    exact = results(reference, doubled(rounded), reduction)
    ours = results(kernels.linear_cross_entropy, inputs, reduction)
    torchs = results(reference, inputs, reduction)
    for found, other, true in zip(ours, torchs, exact, strict=True):
        # the interpreter cuts slopes off where a GPU rounds them
        assert worst([found], [true]) <= 2 * worst([other], [true]) + 1e-3


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_rows_without_labels_count_nothing(reduction: str):
    hidden, weight, labels = draw(7, torch.float32)
    found = results(kernels.linear_cross_entropy, [hidden, weight, labels.fill_(-100)], reduction)
    assert not any(tensor.any() for tensor in found)


def test_no_rows_give_no_loss_and_no_gradient():
    hidden, weight, labels = draw(3, torch.float32)
    found = results(kernels.linear_cross_entropy, [hidden[:0], weight, labels[:0]], "sum")
    assert not any(tensor.any() for tensor in found)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.usefixtures("blocks_of_64")
def test_large_logits_do_not_overflow(reduction: str):
    hidden, weight, labels = draw(10, torch.float32)
    inputs = [hidden * 1e4, weight, labels]
    exact = results(reference, doubled(inputs), reduction)
    assert worst(results(kernels.linear_cross_entropy, inputs, reduction), exact) <= 1e-5


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_gradient_that_nobody_wants_changes_nothing(reduction: str, wanted: str):
    inputs = draw(9, torch.float32)
    both = results(kernels.linear_cross_entropy, inputs, reduction)
    place = ["hidden", "weight"].index(wanted)
    leaves = list(inputs)
    leaves[place] = inputs[place].clone().requires_grad_()
    loss = kernels.linear_cross_entropy(*leaves, reduction)
    generator = torch.Generator().manual_seed(99)
    cotangent = torch.randn(tuple(loss.shape), generator=generator).bfloat16().to(DEVICE).float()
    (gradient,) = torch.autograd.grad(loss, leaves[place], cotangent)
    assert torch.equal(loss, both[0])
    assert torch.equal(gradient, both[1 + place])


def test_without_gradients_the_loss_is_the_same():
    inputs = draw(9, torch.bfloat16)
    with torch.no_grad():
        alone = kernels.linear_cross_entropy(*inputs, "sum")
    assert torch.equal(alone, results(kernels.linear_cross_entropy, inputs, "sum")[0])


def test_a_label_outside_the_vocabulary_shows_in_the_loss():
    hidden, weight, labels = draw(5, torch.float32)
    labels[0] = weight.shape[0]
    assert kernels.linear_cross_entropy(hidden, weight, labels, "sum").isnan()


def test_a_second_backward_is_refused():
    hidden, weight, labels = draw(5, torch.float32)
    loss = kernels.linear_cross_entropy(hidden, weight.requires_grad_(), labels, "sum")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_chunks_share_the_rows_and_keep_to_the_limit():
    nano = torch.empty(131072, 8, device="meta", dtype=torch.bfloat16)
    for rows, expected in ((8192, 4096), (8200, 2816), (100, 128), (4096, 4096)):
        hidden = torch.empty(rows, 8, device="meta", dtype=torch.bfloat16)
        assert kernels.chunk_rows(hidden, nano) == expected
    assert kernels.chunk_rows(torch.empty(8192, 8, device="meta"), nano) == 2048


@pytest.mark.parametrize("weighted", [False, True])
def test_the_form_of_torch_takes_all_rows_where_the_host_must_not_wait(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
):
    hidden, weight, labels = draw(150, torch.float32)
    weights = torch.rand(150, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weights = weights if weighted else None
    usual = results(chunked, [hidden, weight, labels], "sum", weights)

    monkeypatch.setattr(package, "_chunks", lambda *parts: package.all_rows(*parts[:2], 64))
    found = results(chunked, [hidden, weight, labels], "sum", weights)
    assert worst(found, doubled(usual)) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_host_does_not_wait_for_the_device(reduction: str, no_waits):
    hidden, weight, labels = draw(300, torch.bfloat16)
    weights = torch.rand(300, device=DEVICE)
    for function in (kernels.linear_cross_entropy, chunked):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

        def step(function=function, leaves=leaves) -> None:
            function(*leaves, labels, reduction, weights).sum().backward()

        step()  # compiles
        with no_waits():
            step()
