"""Scores of texts that begin alike are those of one pass over each text."""

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from nemotron.generate import scoring
from nemotron.generate.branches import Scored, Stem, grow
from nemotron.generate.decode_layers import prepare_weights
from nemotron.generate.scoring import Scorer
from nemotron.model.hybrid import HybridLM
from tests.support.models import build

STEM, CONTEXTS, CHOICES = 40, 5, 3


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return build()


def questions(vocab_size: int) -> list[Scored]:
    """Return texts with one beginning for all, and one for each question with several choices."""
    draw = random.Random(7)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocab_size) for _ in range(count))

    texts, stem = [], tokens(STEM)
    for number in range(CONTEXTS):
        context = stem + tokens(17 + 3 * number)
        for size in range(1, CHOICES + 1):
            texts.append(Scored(context + tokens(size), len(context)))
        texts.append(Scored(context + tokens(1), len(context)))
    texts += [Scored(tokens(9), 1), Scored(tokens(2), 1), texts[0], Scored(stem + tokens(30), 8)]
    draw.shuffle(texts)
    return texts


def expected(model: HybridLM, text: Scored) -> tuple[float, bool]:
    ids = torch.tensor([text.tokens])
    with torch.no_grad():
        logprobs = model.logits(model(ids))[0, text.start - 1 : -1].log_softmax(-1)
    targets = ids[0, text.start :, None]
    is_greedy = bool((logprobs.argmax(-1) == targets[:, 0]).all())
    return logprobs.gather(1, targets).sum().item(), is_greedy


def stems_of(stem: Stem) -> Iterator[Stem]:
    yield stem
    yield from itertools.chain.from_iterable(map(stems_of, stem.stems))


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_scores_are_those_of_one_pass_over_each_text(model: HybridLM, rows: int):
    texts = questions(model.config.vocab_size)
    wanted = [expected(model, text) for text in texts]
    # the likeliest continuation, so that is_greedy is seen true
    with torch.no_grad():
        best = int(model.logits(model(torch.tensor([texts[0].tokens])))[0, -1].argmax())
    texts.append(Scored((*texts[0].tokens, best), len(texts[0].tokens)))
    wanted.append(expected(model, texts[-1]))
    done: list[int] = []
    found = Scorer(model, rows).score(texts, done.append)
    # sums of a few float64 log-probabilities, computed in other shapes
    assert [one.logprob for one in found] == pytest.approx([w for w, _ in wanted], abs=1e-9)
    assert [one.is_greedy for one in found] == [greedy for _, greedy in wanted]
    assert wanted[-1][1]
    assert sum(done) == len(texts)


def test_pieces_change_nothing(model: HybridLM, monkeypatch: pytest.MonkeyPatch):
    texts = questions(model.config.vocab_size)
    whole = Scorer(model).score(texts)
    monkeypatch.setattr(scoring, "PIECE", 7)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 2)
    pieces = Scorer(model).score(texts)
    assert [one.logprob for one in pieces] == pytest.approx([o.logprob for o in whole], abs=1e-9)


def test_what_texts_have_in_common_is_read_once(model: HybridLM, monkeypatch: pytest.MonkeyPatch):
    texts = questions(model.config.vocab_size)
    read = []
    extend = scoring.extend

    def counted(model, rows, tokens):  # type: ignore[no-untyped-def]
        read.append(tokens.numel())
        return extend(model, rows, tokens)

    monkeypatch.setattr(scoring, "extend", counted)
    Scorer(model).score(texts)
    apart = sum(len(text.tokens) - 1 for text in texts)
    # contexts of one batch are read together as far as the shortest goes, so some is read again
    assert sum(read) < apart / 2.5, (read, apart)


def test_every_text_is_in_the_tree_once_and_begins_as_its_stems_do(model: HybridLM):
    texts = questions(model.config.vocab_size)
    root, members = grow(texts, least=1), []
    for stem in stems_of(root):
        for leaf in stem.leaves:
            assert leaf.inputs[: stem.length] == stem.tokens
            assert stem.length <= leaf.own
            members += leaf.members
        assert all(inner.length > stem.length for inner in stem.stems)
        assert all(inner.tokens[: stem.length] == stem.tokens for inner in stem.stems)
    assert sorted(members) == list(range(len(texts)))


def test_all_states_are_given_back_and_prepared_weights_agree():
    model = build()
    texts = questions(model.config.vocab_size)
    plain = Scorer(model).score(texts)
    scorer = Scorer(prepare_weights(model), rows=4)
    found = scorer.score(texts)
    assert [one.logprob for one in found] == pytest.approx([o.logprob for o in plain], abs=1e-9)
    assert scorer._cache.num_free_slots == 4
    assert scorer._cache.blocks.used == 0
