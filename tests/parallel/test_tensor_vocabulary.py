"""A table, and the loss over it, that ranks share: the same numbers as from the whole table."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemotron.ops import linear_cross_entropy as package
from nemotron.ops.linear_cross_entropy import linear_cross_entropy
from nemotron.parallel.vocabulary import Vocabulary, find
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed

VOCAB, WIDTH = 20, 6


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def here() -> Vocabulary:
    return Vocabulary(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


def own(whole: Tensor, dim: int) -> Tensor:
    return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone().requires_grad_()


def draw(rows: int, length: int, only: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, table, labels from `only` and some without, and weights."""
    generator = torch.Generator().manual_seed(length)
    labels = torch.randint(only.start, only.stop, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    weights = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    hidden, table = random(rows, length, WIDTH, seed=1), random(VOCAB, WIDTH, seed=2)
    return 9 * hidden, table, labels, weights


def shared_loss(
    hidden: Tensor, table: Tensor, labels: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    part, rows = own(hidden.to(dtype), 1), own(table.to(dtype), 0)
    loss = here().loss(part, rows, labels, weights)
    (loss / 7).backward()
    return loss.detach(), part.grad, rows.grad


EVERYWHERE = range(VOCAB)
CASES = {
    "labels of all ranks": EVERYWHERE,
    "labels of the last rank alone": range(17, VOCAB),
    "labels of the first rank alone": range(3),
}


@pytest.mark.parametrize("length", [8, 600])  # 600 x 2 are more than a chunk
@pytest.mark.parametrize("only", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_is_that_of_the_whole_table(
    pair: Pool, four: Pool, length: int, only: range, weighted: bool
):
    *inputs, labels, weights = draw(2, length, only)
    hidden, table = (tensor.requires_grad_() for tensor in inputs)
    shares = weights.flatten() if weighted else None
    loss = linear_cross_entropy(hidden.flatten(0, 1), table, labels.flatten(), shares)
    (loss / 7).backward()
    for pool in (pair, four):
        results = pool.run(
            small_chunks,
            hidden.detach(),
            table.detach(),
            labels,
            weights if weighted else None,
            torch.float64,
        )
        losses, hiddens, tables = zip(*results, strict=True)
        assert all(torch.equal(found, losses[0]) for found in losses)
        # the order of sums alone differs
        assert_close(losses[0], loss.detach(), 1e-12)
        assert_close(torch.cat(hiddens, 1), hidden.grad, 1e-12)
        assert_close(torch.cat(tables), table.grad, 1e-12)


def small_chunks(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """The loss from chunks of 64 rows, so that there are many."""
    usual, package.CHUNK_ELEMENTS = package.CHUNK_ELEMENTS, 1
    try:
        return shared_loss(*arguments)
    finally:
        package.CHUNK_ELEMENTS = usual


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def shared_logprobs(
    hidden: Tensor, table: Tensor, labels: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probability of each token from chunks of 64 rows, and the gradients."""
    part, rows = own(hidden, 1), own(table, 0)
    usual, package.CHUNK_ELEMENTS = package.CHUNK_ELEMENTS, 1
    try:
        found = here().token_logprobs(part, rows, labels)
        (found * slope).sum().backward()
    finally:
        package.CHUNK_ELEMENTS = usual
    return found.detach(), part.grad, rows.grad


@pytest.mark.parametrize("length", [8, 600])
def test_log_probabilities_of_tokens_are_those_of_the_whole_table(
    pair: Pool, four: Pool, length: int
):
    *inputs, labels, slope = draw(2, length, EVERYWHERE)
    hidden, table = (tensor.requires_grad_() for tensor in inputs)
    logits = (hidden @ table.T).log_softmax(-1)
    exact = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    exact = exact.masked_fill(labels == -100, 0)
    (exact * slope).sum().backward()
    for pool in (pair, four):
        results = pool.run(shared_logprobs, hidden.detach(), table.detach(), labels, slope)
        found, hiddens, tables = zip(*results, strict=True)
        assert all(torch.equal(one, found[0]) for one in found)
        # the order of sums alone differs
        assert_close(found[0], exact.detach(), 1e-12)
        assert_close(torch.cat(hiddens, 1), hidden.grad, 1e-12)
        assert_close(torch.cat(tables), table.grad, 1e-12)


def test_rows_without_labels_count_nothing(pair: Pool):
    hidden, table, labels, _ = draw(2, 8, EVERYWHERE)
    for loss, grad_hidden, grad_table in pair.run(
        shared_loss, hidden, table, torch.full_like(labels, -100), None, torch.float64
    ):
        assert not loss.any()
        assert not grad_hidden.any()
        assert not grad_table.any()


def test_bfloat16_loses_only_its_own_digits(pair: Pool):
    hidden, table, labels, weights = draw(2, 32, EVERYWHERE)
    loss = linear_cross_entropy(hidden.flatten(0, 1), table, labels.flatten(), weights.flatten())
    for found, *_ in pair.run(shared_loss, hidden, table, labels, weights, torch.bfloat16):
        assert found.dtype == torch.float32
        assert_close(found.double(), loss, 2e-2)


def looked_up(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    rows = own(table, 0)
    part = here().embed(ids, rows)
    slope = random(*ids.shape, WIDTH, seed=5)
    (part * own(slope, 1).detach()).sum().backward()
    return part.detach(), rows.grad


def test_embeddings_of_a_ranks_tokens_come_from_all_ranks(pair: Pool, four: Pool):
    ids = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(3))
    ids[0] = VOCAB - 1
    table = random(VOCAB, WIDTH, seed=2).requires_grad_()
    embedded = F.embedding(ids, table)
    (embedded * random(3, 16, WIDTH, seed=5)).sum().backward()
    for pool in (pair, four):
        parts, gradients = zip(*pool.run(looked_up, ids, table.detach()), strict=True)
        assert torch.equal(torch.cat(parts, 1), embedded)
        assert_close(torch.cat(gradients), table.grad, 1e-14)


def all_logits(hidden: Tensor, table: Tensor) -> Tensor:
    return here().logits(own(hidden, 1), own(table, 0))


def test_logits_are_those_of_all_tokens_over_the_whole_vocabulary(pair: Pool):
    hidden, table, _, _ = draw(2, 8, EVERYWHERE)
    for found in pair.run(all_logits, hidden, table):
        assert_close(found, hidden @ table.T, 1e-14)


def test_an_id_outside_the_vocabulary_is_found_nowhere():
    ids = torch.tensor([-1, 0, 9, 10, 19, 20])
    first, on_first = find(ids, 10, 0, 2)
    last, on_last = find(ids, 10, 1, 2)
    assert on_first.tolist() == [True, True, True, False, False, False]
    assert on_last.tolist() == [False, False, False, True, True, True]
    assert first[0] == -1  # no row has that number, so the look-up fails
    assert last[-1] == 10
    assert all(0 <= row < 10 for row in [*first[1:], *last[:-1]])
