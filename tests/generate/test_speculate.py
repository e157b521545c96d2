"""Speculative decoding: the same answers in fewer passes, and no trace of what was refused."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from nemotron.data.batch import shift_left
from nemotron.errors import UserError
from nemotron.generate.acceptance import Acceptance
from nemotron.generate.decode_layers import decode_view
from nemotron.generate.draft_length import (
    DraftLengths,
    Record,
    estimated_cost,
    paying_length,
)
from nemotron.generate.drafts import LookupDrafter
from nemotron.generate.engine import Engine
from nemotron.generate.request import Answer, DraftedPass, Request
from nemotron.generate.rollback import Way
from nemotron.generate.sample import Sample
from nemotron.generate.sampling import (
    Choice,
    Sampling,
    accept_or_draw,
    choose,
    distribution,
)
from nemotron.generate.selection import Draft
from nemotron.generate.speculate import Speculation
from nemotron.model.cache import Cache
from nemotron.model.hybrid import HybridLM
from nemotron.model.state import KeyValues, MambaSlots
from tests.generate.test_scheduling import check_nothing_is_left, prompt, small_engine
from tests.support.cases import further
from tests.support.models import build, build_config

GREEDY, VOCAB = Sampling(0.0), 20
# float64: other orders of sums
TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def model() -> HybridLM:
    """Float64: other orders of sums change no token. Tests must not change it."""
    return build(hybrid_override_pattern="ME*M")


class Planned:
    """Drafts that begin with the right tokens, and then go wrong: any pattern can be had."""

    def __init__(self, right: dict[int, list[int]], patterns: dict[int, list[int]]) -> None:
        self._right, self._patterns = right, patterns

    def follow(self, *read: object) -> None: ...

    def keep(self, *read: object) -> None: ...

    def skip(self, *read: object) -> None: ...

    def reach(self, sample: Sample, longest: int) -> int:
        return longest

    def draft(self, model: HybridLM, samples: list, counts: list[int]) -> list[list[Draft]]:
        found = []
        for sample, count in zip(samples, counts, strict=True):
            at, pattern = len(sample.answer.tokens), self._patterns[sample.request_id]
            num_right = pattern[len(sample.answer.passes) % len(pattern)]
            text = self._right[sample.request_id][at : at + count]
            found.append([Draft(t if k < num_right else (t + 1) % 61) for k, t in enumerate(text)])
        return found


def states(cache: Cache, slot: int) -> list[Tensor]:
    """Return all that the cache remembers of a slot."""
    table, length = cache.tables[slot], cache.lengths[slot]
    found = []
    for layer in cache.layers:
        if isinstance(layer, MambaSlots):
            found += [layer.conv[slot].clone(), layer.ssm[slot].clone()]
        elif isinstance(layer, KeyValues):
            found += [t[table].flatten(0, 1)[:length].clone() for t in (layer.keys, layer.values)]
    return found


@dataclass
class Oracle:
    """Plain decoding: its answers, and the states after every token."""

    requests: list[Request]
    right: dict[int, list[int]]
    states: dict[tuple[int, int], list[Tensor]]
    """By request and length of the text."""


@pytest.fixture(scope="module")
def oracle(model: HybridLM) -> Oracle:
    generator = random.Random(1)
    requests = [Request(prompt(generator, 20), 24, GREEDY) for _ in range(3)]
    right, found = {}, {}
    for number, request in enumerate(requests):
        engine = small_engine(model, slots=1)
        engine.submit(request)
        while not engine.is_idle:
            engine.step()
            for sample in engine.scheduler.running:
                right[number] = list(sample.answer.tokens)
                found[number, engine.cache.lengths[0]] = states(engine.cache, 0)
    return Oracle(requests, right, found)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", ["replay", "store", "snapshot"])
def test_states_after_every_pattern_of_acceptance_are_those_of_plain_decoding(
    model: HybridLM, oracle: Oracle, way: Way, packed: bool
) -> None:
    model = decode_view(model, pack=True) if packed else model
    # three texts side by side, so that each number of drafts is kept beside each other
    patterns = {0: [0, 1, 2, 3], 1: [3, 3, 0, 2, 1], 2: [2, 0, 0, 3, 1, 1, 3]}
    speculation = Speculation("lookup", 3, rollback=way, adaptive=False)
    engine = small_engine(model, speculation=speculation, slots=4)
    engine.speculator.drafter = Planned(oracle.right, patterns)
    for request in oracle.requests:
        engine.submit(replace(request, max_tokens=23))
    seen = set()
    while not engine.is_idle:
        engine.step()
        for sample in engine.scheduler.running:
            if not sample.answer.passes:
                continue
            seen.add((sample.request_id, sample.answer.passes[-1].num_accepted))
            expected = oracle.states[sample.request_id, engine.cache.lengths[sample.slot]]
            for ours, theirs in zip(states(engine.cache, sample.slot), expected, strict=True):
                assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
    assert seen == {(number, count) for number in range(3) for count in range(4)}
    check_nothing_is_left(engine)


@pytest.mark.parametrize("source", ["mtp", "lookup"])
@pytest.mark.parametrize("way", ["replay", further("store"), further("snapshot")])
def test_greedy_answers_are_those_without_speculation(
    model: HybridLM, way: Way, source: str
) -> None:
    generator = random.Random(5)
    prompts = [prompt(generator) for _ in range(9)]
    expected = small_engine(model, slots=4).generate(prompts, 20, GREEDY)
    engine = small_engine(
        model, slots=4, blocks=30, speculation=Speculation(source, 3, rollback=way, adaptive=False)
    )
    assert engine.generate(prompts, 20, GREEDY) == expected
    check_nothing_is_left(engine)


def test_matched_answers_are_those_without_speculation_for_each_seed(model: HybridLM) -> None:
    generator = random.Random(6)
    prompts, sampling = [prompt(generator) for _ in range(6)], Sampling(0.7, top_p=0.9, seed=3)
    expected = small_engine(model, slots=4).generate(prompts, 20, sampling)
    engine = small_engine(
        model, slots=4, speculation=Speculation("mtp", 3, "match", adaptive=False)
    )
    assert engine.generate(prompts, 20, sampling) == expected


def test_the_first_drafted_token_is_predicted_as_in_training(
    model: HybridLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after passes without drafts, whose hidden states the block reads later."""

    def at_random(lengths: DraftLengths, samples: list[Sample], reaches: list[int]) -> list[int]:
        return [min(generator.choice([0, 0, 3]), reach) for reach in reaches]

    monkeypatch.setattr(DraftLengths, "choose", at_random)
    generator = random.Random(7)
    prompts = [prompt(generator) for _ in range(8)]
    speculation = Speculation("mtp", 3)
    engine = small_engine(model, slots=8, prefixes=2, speculation=speculation)
    for number, given in enumerate(prompts):
        engine.submit(Request(given, 14, Sampling(0.8, seed=number)))
    num_seen = 0
    while not engine.is_idle:
        engine.step()
        ready = [s for s in engine.scheduler.running if engine._num_left(s) == 1]
        if not ready:
            continue
        seen: list[Tensor] = []
        drafter = engine.speculator.drafter
        pick = drafter._pick

        def look(samples: list, logits: Tensor, place: int) -> list[Draft]:
            seen.append(logits)  # noqa: B023  # used before the next turn
            return pick(samples, logits, place)  # noqa: B023

        drafter._pick = look
        engine.scheduler.make_room(ready, 4)
        drafter.draft(model, ready, [1] * len(ready))
        drafter._pick = pick
        for row, sample in enumerate(ready):
            text = torch.tensor([sample.tokens])
            with torch.no_grad():
                [hidden] = model.mtp_hidden(model(text), [shift_left(text, None, vacated=0)], None)
                expected = model.logits(hidden)[0, -2]
            assert (seen[0][row] - expected).abs().max() <= 1e-9
            num_seen += 1
    assert num_seen > 40


def test_an_answer_without_drafts_for_long_gets_none_any_more(
    model: HybridLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block does not know the text; nor that of a request which goes on from its state."""
    monkeypatch.setattr("nemotron.generate.speculate.HELD", 5)
    wanted: list[int] = []

    def choose(lengths: DraftLengths, samples: list[Sample], reaches: list[int]) -> list[int]:
        return [min(wanted.pop(0) if wanted else 2, reach) for reach in reaches]

    monkeypatch.setattr(DraftLengths, "choose", choose)
    engine = small_engine(model, slots=1, prefixes=1, speculation=Speculation("mtp", 3))

    def answer(prompt: tuple[int, ...], *counts: int) -> Answer:
        wanted[:] = counts
        *_, ended = engine.run([Request(prompt, 14, GREEDY)])
        wanted.clear()
        return ended.answer

    awake = answer((5, 6, 7), *[0] * 5)
    assert any(done.num_drafts for done in awake.passes)
    asleep = answer((5, 6, 8), *[0] * 6)
    assert not any(done.num_drafts for done in asleep.passes)
    assert asleep.tokens == small_engine(model).generate([(5, 6, 8)], 14, GREEDY)[0]
    longer = (5, 6, 8, *asleep.tokens, 4, 4)
    assert not any(done.num_drafts for done in answer(longer).passes)
    engine.prefixes.clear()
    assert any(done.num_drafts for done in answer(longer).passes)


def count_tokens(model: HybridLM, count: int, speculation: Speculation) -> Tensor:
    """Return how often each pair of second and third tokens follows the prompt [3, 1, 4]."""
    engine = Engine(model, slots=min(count, 256), speculation=speculation)
    request = Request((3, 1, 4), 4, Sampling(0.8, top_k=12, seed=11), num_samples=count)
    pairs = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for event in engine.run([request]):
        if event.finish is not None:
            pairs[event.answer.tokens[1], event.answer.tokens[2]] += 1
    return pairs


@torch.no_grad()
def expected_shares(model: HybridLM) -> Tensor:
    """Return the probability of each pair of second and third tokens, summed over the first."""
    vocabulary = torch.arange(VOCAB)

    def following(texts: Tensor) -> Tensor:
        return distribution(model.logits(model(texts)[:, -1]), Sampling(0.8, top_k=12))

    prompt = torch.tensor([[3, 1, 4]])
    first = following(prompt)[0]
    result = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for token in vocabulary[first > 0]:
        text = torch.cat([prompt[0], token[None]])
        second = following(text[None])[0]
        texts = torch.cat([text.expand(VOCAB, -1), vocabulary[:, None]], dim=1)
        result += first[token] * second[:, None] * following(texts)
    return result


def p_value(counts: Tensor, shares: Tensor) -> float:
    """Return the chi-square test's probability of counts that are as far off; rare cells joined."""
    expected = counts.sum() * shares.flatten()
    order = expected.argsort()
    rare = order[expected[order].cumsum(0) <= 8]
    common = order[len(rare) :]
    found = torch.cat([counts.flatten()[rare].sum()[None], counts.flatten()[common]])
    due = torch.cat([expected[rare].sum()[None], expected[common]])
    found, due = found[due > 0], due[due > 0]
    distance = ((found - due) ** 2 / due).sum()
    freedom = torch.tensor(len(due) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, distance / 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("mtp", 3000),
        further(("lookup", 3000)),
        further(("mtp", 50_000)),
        further(("lookup", 50_000)),
    ],
)
def test_drawn_tokens_have_the_distribution_of_plain_decoding(source: str, count: int) -> None:
    model = build(hybrid_override_pattern="M*", vocab_size=VOCAB)
    counts = count_tokens(model, count, Speculation(source, 2, adaptive=False))
    chance = p_value(counts, expected_shares(model))
    print(f"{source}, {count:,} answers: p = {chance:.3g}")
    assert chance > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("share", "count"), [(0.2, 3000), further((0.8, 50_000))])
def test_a_planted_bias_is_noticed(
    share: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_eager(*call: object) -> Choice:
        *others, test, uniform = call
        return accept_or_draw(*others, share * test, uniform)

    monkeypatch.setattr("nemotron.generate.selection.accept_or_draw", too_eager)
    model = build(hybrid_override_pattern="M*", vocab_size=VOCAB)
    counts = count_tokens(model, count, Speculation("mtp", 2, adaptive=False))
    chance = p_value(counts, expected_shares(model))
    print(f"a bias, {count:,} answers: p = {chance:.3g}")
    assert chance < 1e-3


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.6, top_p=0.8), Sampling(1.4, top_k=9, min_p=0.02)]
)
def test_accepted_and_redrawn_tokens_have_the_distribution_of_choose(sampling: Sampling) -> None:
    count, generator = 50_000, torch.Generator().manual_seed(5)
    logits, guess = torch.randn(2, VOCAB, generator=generator)
    guess = 0.6 * logits + 0.4 * guess
    draw, test, uniform = torch.rand(3, count, generator=generator, dtype=torch.float64)
    drafts = choose(guess.expand(count, -1), sampling, draw).tokens
    drafted_with = distribution(guess[None], sampling).expand(count, -1)
    many, shares = logits.expand(count, -1), distribution(logits[None], sampling)[0]

    def probability(test: Tensor) -> float:
        choice = accept_or_draw(many, sampling, drafts, drafted_with, test, uniform)
        assert (choice.logprobs - shares[choice.tokens].log()).abs().max() <= 1e-12
        counts = torch.bincount(choice.tokens, minlength=VOCAB).double()
        assert not counts[shares == 0].any()
        return p_value(counts, shares)

    assert probability(test) > 1e-3
    assert probability(0.8 * test) < 1e-6  # a bias: too many drafts are accepted


def test_a_repeated_text_is_looked_up(model: HybridLM) -> None:
    engine = small_engine(model, speculation=Speculation("lookup", 4, adaptive=False))
    engine.submit(Request((7, 8, 9, 10, 11, 5, 7, 8), 30, GREEDY))
    engine.step()
    [sample] = engine.scheduler.running
    drafter = LookupDrafter()
    sample.tokens = [7, 8, 9, 10, 11, 5, 7, 8]
    assert [d.token for d in drafter.draft(model, [sample], [3])[0]] == [9, 10, 11]
    sample.tokens += [9, 1, 7, 8, 9]
    # the longest end that is known goes first: 7 8 9 went on with 1 last
    assert [d.token for d in drafter.draft(model, [sample], [2])[0]] == [1, 7]
    sample.tokens += [60]
    assert drafter.draft(model, [sample], [2]) == [[]]
    sample.forced.extend([4, 4, 2])
    assert [d.token for d in drafter.draft(model, [sample], [2])[0]] == [4, 4]


def test_acceptance_is_given_in_both_published_forms() -> None:
    acceptance = Acceptance()
    answers = [[(3, 3), (3, 1), (0, 0)], [(2, 0)]]
    for answer in answers:
        passes = [DraftedPass(*numbers) for numbers in answer]
        for done in passes:
            acceptance.count(done)
        acceptance.end(passes)
    assert acceptance.length == 1 + 4 / 3
    assert acceptance.mean_answer_length == ((4 + 2 + 1) / 3 + 1) / 2
    assert acceptance.rate == 4 / 8
    assert acceptance.joint == [2 / 3, 1 / 3, 1 / 3]
    assert acceptance.conditional == [2 / 3, 1 / 2, 1]
    assert acceptance.histogram == {4: 1, 2: 1, 1: 2}
    assert "50.0% accepted; 2.33 tokens a pass, 1.67 as the mean" in str(acceptance)


def test_drafts_are_as_long_as_they_pay() -> None:
    right, wrong, none = DraftedPass(5, 5), DraftedPass(1, 0), DraftedPass(0, 0)

    def rate(*passes: DraftedPass) -> float:
        record = Record()
        for done in passes:
            record.note(done)
        return record.rate

    assert rate() == rate(*[right] * 4, *[none] * 50) == 1
    assert rate(*[wrong] * 20) < 0.2 < 0.6 < rate(*[wrong] * 20, *[right] * 10)

    def length(rates: list[float], reaches: list[int], cost: float, others: int = 0) -> int:
        return paying_length(rates, reaches, lambda count: 1 + cost * count, others)

    assert length([1.0], [5], cost=0.7) == 5
    assert length([1.0], [2], cost=0.7) == 2
    assert length([0.4], [5], cost=0.5) == 0
    assert length([0.8], [5], cost=0.6) == 1
    assert 1 < length([0.7], [5], cost=0.15) < 5
    assert length([0.8, 0.9], [0, 3], cost=0.5) == 0  # one of two could have a draft
    assert length([0.8], [5], cost=0.5, others=2) == 2  # the pass is that long in any case


def test_no_drafts_are_made_where_none_pay() -> None:
    """Times decide for a greedy answer; for one of a given seed, only its own drafts."""
    pattern = {"hybrid_override_pattern": "M-*-" * 6, "intermediate_size": 8192}
    config = build_config(hidden_size=2048, **pattern)
    lengths = DraftLengths(config, 1, "cpu", longest=3, is_drawn=True, has_block=True)
    greedy, drawn = (
        Sample(0, 0, 0, Request((1,), 900, Sampling(temperature, seed=1)), 1, frozenset(), None)
        for temperature in (0.0, 1.0)
    )

    def count(sample: Sample, added: float, right: int) -> int:
        [found] = lengths.choose([sample], [3])
        done = DraftedPass(found, min(found, right))
        lengths.note([sample], [done], 1 + added * found)
        return found

    measured = [count(greedy, 0.1, 3) for _ in range(9)]
    assert measured == [0, 0, 0, 1, 1, 1, 3, 3, 3]
    assert {count(greedy, 0.1, 3) for _ in range(20)} == {3}
    assert lengths.choose([greedy], [0]) == [0]
    assert 0 in {count(greedy, 2.0, 3) for _ in range(20)}
    assert {count(greedy, 2.0, 3) for _ in range(80)} == {0}
    assert count(drawn, 0.0, 0) == 3
    found = [count(drawn, 0.0, 0) for _ in range(100)]
    assert found[-30:].count(0) >= 29
    assert 1 in found[30:]  # now and then one is tried


def test_more_rows_make_drafts_dearer_on_a_processor_than_on_a_gpu() -> None:
    config = build_config(hidden_size=96, vocab_size=4096)
    on_cpu = [estimated_cost(config, rows, "cpu", has_block=True) for rows in (1, 8)]
    on_gpu = [estimated_cost(config, rows, "cuda", has_block=True) for rows in (1, 8)]
    assert on_cpu[0] < on_cpu[1]
    assert on_gpu[1] < on_cpu[1]
    assert estimated_cost(config, 1, "cpu", has_block=False) < on_cpu[0]


def test_impossible_speculation_is_refused(model: HybridLM) -> None:
    with pytest.raises(UserError, match=r"draft_tokens = 0 must lie in 1 … 16\."):
        Speculation(length=0)
    with pytest.raises(UserError, match="speculate = guess is not known; use one of mtp, lookup"):
        Speculation("guess")
    without = build(
        hybrid_override_pattern="M", num_nextn_predict_layers=0, mtp_hybrid_override_pattern=None
    )
    with pytest.raises(UserError, match="has no multi-token-prediction block to draft with; use"):
        Engine(without, speculation=Speculation())
    engine = small_engine(model, blocks=5, speculation=Speculation(length=3))
    with pytest.raises(UserError, match="are 22 tokens with drafts, but the cache has room for 20"):
        engine.submit(Request(tuple(range(11)), 8))
