"""The head's log-probabilities against softmax over all logits."""

import pytest
import torch

from nemotron.data.batch import NO_LABEL
from nemotron.model.linear import Head
from nemotron.ops import linear_cross_entropy as package

VOCAB, WIDTH = 37, 12


def draw(rows: int, length: int) -> tuple[Head, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head, hidden states, labels of which some are absent, and a gradient for each token."""
    generator = torch.Generator().manual_seed(length)
    head = Head(WIDTH, VOCAB).double()
    with torch.no_grad():
        head.weight.normal_(generator=generator)
    hidden = torch.randn(rows, length, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.2] = NO_LABEL
    slope = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    return head, hidden.requires_grad_(), labels, slope


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("length", [1, 35])  # 3 x 35 are more than a chunk of 64
def test_log_probabilities_are_those_of_log_softmax(
    length: int, temperature: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(package, "CHUNK_ELEMENTS", 1)
    head, hidden, labels, slope = draw(3, length)
    found = head.token_logprobs(hidden, labels, temperature)
    (found * slope).sum().backward()
    grads = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    logits = hidden @ head.weight.T / temperature
    exact = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    exact = exact.masked_fill(labels == NO_LABEL, 0)
    (exact * slope).sum().backward()
    # the order of sums alone differs
    assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(grads, (hidden.grad, head.weight.grad), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-12)


def test_a_frozen_head_passes_the_gradient_to_hidden_states_alone():
    head, hidden, labels, slope = draw(2, 9)
    head.weight.requires_grad_(False)
    (head.token_logprobs(hidden, labels) * slope).sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert head.weight.grad is None
