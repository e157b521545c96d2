import pytest
import torch
import torch.nn.functional as F
from against_reference import doubled, results, worst
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron.ops.linear_cross_entropy import chunked, linear_cross_entropy, reference


def draw(tokens: int, width: int = 12, vocab: int = 37) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    labels = torch.randint(vocab, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < 0.2] = -100
    return [
        torch.randn(tokens, width, generator=g),
        torch.randn(vocab, width, generator=g),
        labels,
    ]


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("tokens", [1, 7, 600, 1100])
def test_losses_and_gradients_are_those_of_torch(tokens: int, reduction: str):
    hidden, weight, labels = draw(tokens)

    def torchs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, labels, reduction=reduction)

    exact = results(torchs, doubled([hidden, weight, labels]))
    for function in (reference, chunked):
        found = results(function, doubled([hidden, weight, labels]), reduction)
        assert worst(found, exact) <= 1e-12
        assert worst(results(function, [hidden, weight, labels], reduction), exact) <= 1e-5


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weighted_losses_and_gradients_are_those_of_torch(reduction: str):
    hidden, weight, labels = draw(1100)
    weights = torch.rand(1100, generator=torch.Generator().manual_seed(1))

    def torchs(hidden: Tensor, weight: Tensor, labels: Tensor, *_: object) -> Tensor:
        losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
        losses = losses * weights.to(losses.dtype)
        return losses.sum() if reduction == "sum" else losses

    exact = results(torchs, doubled([hidden, weight, labels]))
    for function in (reference, chunked):
        found = results(function, doubled([hidden, weight, labels]), reduction, weights.double())
        assert worst(found, exact) <= 1e-12
        single = results(function, [hidden, weight, labels], reduction, weights)
        assert worst(single, exact) <= 1e-5


def test_bfloat16_logits_lose_only_their_own_digits():
    hidden, weight, labels = draw(600)
    inputs = [hidden.bfloat16(), weight.bfloat16(), labels]
    exact = results(reference, doubled(inputs), "sum")
    assert worst(results(chunked, inputs, "sum"), exact) <= 2e-2


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_rows_without_labels_count_nothing(reduction: str):
    hidden, weight, labels = draw(20)
    found = results(chunked, [hidden, weight, labels.fill_(-100)], reduction)
    assert not any(tensor.any() for tensor in found)


def test_large_logits_do_not_overflow():
    hidden, weight, labels = draw(50)
    inputs = [hidden * 1e4, weight, labels]
    exact = results(reference, doubled(inputs), "sum")
    assert worst(results(chunked, inputs, "sum"), exact) <= 1e-5


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return func(*args, **(kwargs or {}))


def test_no_gradient_is_computed_where_none_is_recorded():
    hidden, weight, labels = draw(20)
    weight.requires_grad_()
    with Products() as once:
        loss = chunked(hidden.requires_grad_(), weight, labels, "sum")
    with Products() as seen, torch.no_grad():
        assert torch.equal(chunked(hidden, weight, labels, "sum"), loss)
    assert (once.count, seen.count) == (3, 1)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result of an operator had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_logits_of_all_tokens_never_exist(reduction: str):
    tokens, vocab = 4096, 3000
    hidden, weight, labels = draw(tokens, width=8, vocab=vocab)
    hidden.requires_grad_(), weight.requires_grad_()
    with LargestTensor() as seen:
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
        loss.sum().backward()
    assert weight.grad.abs().sum() > 0
    assert seen.elements <= tokens * vocab / 4
