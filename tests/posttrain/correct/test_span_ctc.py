"""CTC of runs of slots: golden values, all paths one by one, and torch's own."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron.posttrain.correct.anti_copy import anti_copy
from nemotron.posttrain.correct.span_ctc import collapse, slots_needed, span_ctc

P = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]
UNIFORM = [[1 / 3] * 3] * 3


def losses(probabilities: Tensor, targets: list[list[int]], slots: list[int]) -> Tensor:
    """Return the loss of each target, all of them in one batch; probabilities [R, S, V]."""
    lengths = torch.tensor([len(target) for target in targets])
    padded = torch.zeros(len(targets), max(1, int(lengths.max())), dtype=torch.int64)
    for row, target in zip(padded, targets, strict=True):
        row[: len(target)] = torch.tensor(target, dtype=torch.int64)
    choices = F.pad(padded, (1, 0))  # the blank is 0
    index = choices.unsqueeze(1).expand(-1, probabilities.shape[1], -1)
    chosen = probabilities.log().gather(2, index)
    return span_ctc(chosen, padded, torch.tensor(slots), lengths)


def enumerated(probabilities: Tensor, target: list[int]) -> float:
    """Return the probability of a target: the sum over all paths that collapse to it."""
    total = 0.0
    for path in itertools.product(range(probabilities.shape[1]), repeat=len(probabilities)):
        if collapse(list(path), 0) == target:
            total += float(
                torch.stack([row[i] for row, i in zip(probabilities, path, strict=True)]).prod()
            )
    return total


@pytest.mark.parametrize(
    ("target", "ways"), [([], 1), ([1], 6), ([1, 2], 5), ([1, 1], 1), ([1, 2, 1], 1)]
)
def test_uniform_slots_give_the_published_numbers_of_ways(target: list[int], ways: int) -> None:
    uniform = torch.tensor([UNIFORM], dtype=torch.float64)
    assert losses(uniform, [target], [3]).exp().item() == pytest.approx(27 / ways)


@pytest.mark.parametrize(
    ("target", "loss"),
    [
        ([], 4.605170),
        ([1], 1.570217),
        ([2], 1.599488),
        ([1, 2], 0.972861),
        ([2, 1], 2.364460),
        ([1, 1], 5.115996),
    ],
)
def test_losses_are_the_published_ones(target: list[int], loss: float) -> None:
    found = losses(torch.tensor([P], dtype=torch.float64), [target], [3])
    assert found.item() == pytest.approx(loss, abs=5e-7)


def test_a_batch_of_uneven_runs_equals_all_paths_one_by_one() -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (9, 6, 4)
    rows = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1)
    targets = [[], [1], [2, 2], [1, 2, 3], [3, 3, 3], [1], [2, 1, 2], [1, 2, 3, 1, 2], [3, 1]]
    slots = [1, 1, 3, 4, 5, 6, 6, 5, 2]
    found = losses(rows, targets, slots)
    for row, target, count, loss in zip(rows, targets, slots, found, strict=True):
        assert abs(loss.exp().item() * enumerated(row[:count], target) - 1) <= 1e-10


def test_300_random_runs_equal_all_paths_one_by_one() -> None:
    rng, generator = random.Random(4), torch.Generator().manual_seed(4)
    impossible = 0
    for _ in range(300):
        slots, size = rng.randint(1, 5), rng.randint(2, 4)
        target = rng.choices(range(1, size), k=rng.randint(0, slots))
        rows = torch.rand((1, slots, size), generator=generator, dtype=torch.float64).softmax(-1)
        ours, every = (
            losses(rows, [target], [slots]).neg().exp().item(),
            enumerated(rows[0], target),
        )
        assert abs(ours - every) <= 1e-10 * every, (slots, target)
        impossible += every == 0
    assert 10 < impossible < 100  # equal neighbors without a slot between them


def test_all_targets_together_have_probability_one() -> None:
    rows = torch.tensor([P], dtype=torch.float64)
    targets = [list(t) for n in range(4) for t in itertools.product([1, 2], repeat=n)]
    possible = [target for target in targets if slots_needed(target) <= 3]
    found = losses(rows.expand(len(possible), -1, -1), possible, [3] * len(possible))
    assert (-found).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_losses_and_gradients_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(5, 11, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = [[1, 2, 3], [4, 4], [6], [], [1, 5, 1, 5]]
    slots = [11, 4, 1, 7, 9]
    found = losses(logits.softmax(-1), targets, slots)
    (own,) = torch.autograd.grad(found.sum(), logits)
    flat = torch.tensor([token for target in targets for token in target])
    logprobs = logits.log_softmax(-1).transpose(0, 1)
    sizes = torch.tensor([len(target) for target in targets])
    expected = F.ctc_loss(logprobs, flat, torch.tensor(slots), sizes, reduction="none")
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(6)
    logprobs = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    targets = torch.tensor([[1, 2, 3], [4, 4, 0], [0, 0, 0]])
    slots, lengths = torch.tensor([5, 4, 3]), torch.tensor([3, 2, 0])
    logprobs.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: span_ctc(x, targets, slots, lengths), logprobs)


def test_neighbors_that_are_kept_take_nothing_from_a_run() -> None:
    """The published loss, over the whole sentence, merges slots with the kept tokens beside."""
    kept_a, kept_b = [[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]
    sentence = torch.tensor([kept_a + P + kept_b], dtype=torch.float64).clamp(min=1e-300)
    for span, whole, own in [
        ([1], 0.316, 0.208),
        ([2], 0.076, 0.202),
        ([1, 2], 0.0, 0.378),
        ([], 0.424, 0.010),
    ]:
        [published] = losses(sentence, [[1, *span, 2]], [5]).neg().exp().tolist()
        [ours] = losses(torch.tensor([P], dtype=torch.float64), [span], [3]).neg().exp().tolist()
        assert (round(published, 3), round(ours, 3)) == (whole, own)


def test_equal_neighbors_need_a_slot_between_them() -> None:
    assert [slots_needed(t) for t in ([], [1], [1, 1], [2, 2, 2], [1, 2, 1])] == [0, 1, 3, 5, 3]
    found = losses(torch.tensor([UNIFORM], dtype=torch.float64), [[2, 2, 2]], [3])
    assert found.item() > 1e29


def test_anti_copy_has_the_published_values() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, 0.5]])
    label = torch.tensor([0])
    first, both = (anti_copy(logits, label, 3, weight).item() for weight in (0.0, 1.0))
    assert first == pytest.approx(0.546007, abs=1e-6)
    assert both - first == pytest.approx(1.180270, abs=1e-6)
    assert both == pytest.approx(1.726276, abs=2e-6)
    assert math.exp(-first) == pytest.approx(0.579258, abs=1e-6)  # of the label


def test_anti_copy_leaves_the_label_out_where_the_published_code_puts_it_at_zero() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, 0.5]])
    label, truth = torch.tensor([0]), torch.tensor([3])
    ours = (anti_copy(logits, label, 3, 1.0) - anti_copy(logits, label, 3, 0.0)).item()
    coded = F.cross_entropy(logits.scatter(1, label.unsqueeze(1), 0.0), truth).item()
    assert (ours, coded) == (pytest.approx(1.180270, abs=1e-6), pytest.approx(1.351129, abs=1e-6))


def test_the_gradient_of_anti_copy_is_that_of_the_loss() -> None:
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 0, 4])
    assert torch.autograd.gradcheck(lambda x: anti_copy(x, labels, 5, 0.7), logits)
