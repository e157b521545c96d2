"""Many requests at once: what an answer is does not depend on when it came and who was there."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemotron.errors import UserError
from nemotron.generate import engine as engine_module
from nemotron.generate.decode_layers import decode_view
from nemotron.generate.engine import Engine
from nemotron.generate.request import Answer, Event, Request, requests_of
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from nemotron.model.cache import Cache
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM
from tests.support.cases import further
from tests.support.models import build

GREEDY = Sampling(0.0)


@pytest.fixture(scope="module")
def model() -> HybridLM:
    """Float64: other orders of sums change no token. Tests must not change it."""
    return build(hybrid_override_pattern="ME*")


def small_engine(model: HybridLM, prefill_tokens: int = 8, **settings: object) -> Engine:
    """Return an engine with blocks of four tokens, so that short texts need several."""
    return Engine(model, (), prefill_tokens, block_size=4, **settings)


def prompt(generator: random.Random, longest: int = 30) -> tuple[int, ...]:
    return tuple(generator.randrange(61) for _ in range(generator.randint(1, longest)))


def random_request(generator: random.Random) -> Request:
    sampling = Sampling(
        temperature=generator.choice([0.0, 0.0, 0.7, 1.0, 1.5]),
        top_k=generator.choice([None, 5, 40]),
        top_p=generator.choice([None, 0.5, 0.95]),
        min_p=generator.choice([None, 0.05]),
        seed=generator.randrange(1000),
        repetition_penalty=generator.choice([1.0, 1.3]),
        frequency_penalty=generator.choice([0.0, 0.4]),
        logit_bias=generator.choice([{}, {3: -5.0, 8: 1.5}]),
    )
    return Request(
        prompt(generator),
        max_tokens=generator.randint(1, 13),
        sampling=sampling,
        num_samples=generator.choice([1, 1, 1, 1, 3]),
        stop_ids=frozenset(generator.sample(range(61), 2)),
        forced=generator.choice([(), (), (7, 9)]),
        logprobs=True,
        experts=generator.choice([True, False]),
    )


def collect(events: list[Event]) -> dict[tuple[int, int], Answer]:
    """Return the answers by request and sample, and check that events and answers agree."""
    answers: dict[tuple[int, int], Answer] = {}
    tokens: dict[tuple[int, int], list[int]] = {}
    for event in events:
        key = event.request, event.sample
        assert key not in answers or answers[key] is event.answer
        answers[key] = event.answer
        tokens.setdefault(key, []).extend([] if event.token is None else [event.token])
    assert {key: answer.tokens for key, answer in answers.items()} == tokens
    return answers


def check_nothing_is_left(engine: Engine) -> None:
    assert engine.is_idle
    assert not engine.step()
    assert engine.prefixes.num_shared == 0
    engine.prefixes.clear()
    cache = engine.cache
    assert (cache.num_free_slots, cache.blocks.used) == (len(cache.lengths), 0)
    assert not any(cache.tables)
    assert not any(cache.lengths)
    assert not engine.scheduler.waiting
    assert not engine.scheduler.running


class DrawnTime:
    """A clock after which each pass takes as long as a generator draws."""

    def __init__(self) -> None:
        self._generator, self._now = random.Random(1), 0.0

    def perf_counter(self) -> float:
        self._now += self._generator.uniform(0.5, 2.0)
        return self._now


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "prefixes", "speculation"),
    [
        (64, 0, None),
        further((20, 3, None)),
        further((20, 4, None)),
        further((64, 0, Speculation("mtp", 3))),
        (20, 3, Speculation("mtp", 2, "match", "store", adaptive=False)),
        (20, 4, Speculation("lookup", 4)),
    ],
)
def test_answers_of_many_requests_are_those_of_each_alone(
    model: HybridLM,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    prefixes: int,
    speculation: Speculation | None,
) -> None:
    generator = random.Random(prefixes)
    # adaptive drafts: of many lengths, and the same ones each time
    monkeypatch.setattr("nemotron.generate.speculate.time", DrawnTime())
    requests = [random_request(generator) for _ in range(count)]
    # some prompts go on from others'
    requests[10:20] = [
        replace(r, prompt=(*requests[k].prompt, *r.prompt[:7]))
        for k, r in enumerate(requests[10:20])
    ]
    arrival = sorted(generator.randrange(30) for _ in requests)
    canceled = set(generator.sample(range(count), count // 7))
    engine = small_engine(
        model, 5 + prefixes, slots=7, blocks=18, prefixes=prefixes, speculation=speculation
    )
    events, numbers, step = [], [], 0
    while len(numbers) < len(requests) or not engine.is_idle:
        while len(numbers) < len(requests) and arrival[len(numbers)] <= step:
            numbers.append(engine.submit(requests[len(numbers)]))
        if step % 5 == 4 and canceled:
            number = min(canceled)
            if number < len(numbers):
                canceled.discard(number)
                engine.cancel(number)
        events += engine.step()
        step += 1
        for samples in (engine.scheduler.waiting, engine.scheduler.running):
            orders = [sample.order for sample in samples]
            assert orders == sorted(orders)  # so that the oldest gets on
    check_nothing_is_left(engine)
    assert engine.scheduler.num_preempted >= 3
    answers = collect(events)
    assert {answer.finish for answer in answers.values()} == {"stop", "length", "abort"}
    for number, request in enumerate(requests):
        alone = small_engine(model, slots=1, speculation=speculation)
        expected = collect(list(alone.run([request])))
        for sample in range(request.num_samples):
            found, true = answers[number, sample], expected[0, sample]
            length = len(found.tokens) if found.finish == "abort" else len(true.tokens)
            assert found.tokens == true.tokens[:length]
            if found.finish == "abort":
                continue
            assert (found.finish, found.forced) == (true.finish, true.forced)
            for ours, theirs in zip(
                found.logprobs + found.raw_logprobs, true.logprobs + true.raw_logprobs, strict=True
            ):
                assert abs(ours - theirs) <= 1e-6  # log-probabilities pass float32
            if request.experts:
                assert found.experts is not None
                assert found.experts.equal(true.experts)


def test_greedy_tokens_are_the_argmax_of_a_pass_over_the_text(model: HybridLM) -> None:
    generator = random.Random(5)
    prompts = [prompt(generator) for _ in range(9)]
    engine = small_engine(model, slots=4, blocks=20)
    for given, new in zip(prompts, engine.generate(prompts, 12, GREEDY), strict=True):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([[*given, *new]])))[0]
        assert logits[len(given) - 1 : -1].argmax(-1).tolist() == new


def test_samples_of_a_request_read_the_prompt_once_and_are_those_of_single_requests(
    model: HybridLM,
) -> None:
    request = Request(tuple(range(2, 23)), 9, Sampling(seed=4), num_samples=5)
    engine = small_engine(model, slots=2)  # three wait for a slot
    answers = collect(list(engine.run([request])))
    assert engine.timing.prompt_tokens == 21
    single = [replace(request, num_samples=1, sampling=Sampling(seed=4 + k)) for k in range(5)]
    expected = collect(list(small_engine(model).run(single)))
    found = [answers[0, k].tokens for k in range(5)]
    assert found == [expected[k, 0].tokens for k in range(5)]
    assert len(set(map(tuple, found))) == 5
    check_nothing_is_left(engine)


def test_a_canceled_request_ends_wherever_its_samples_are(model: HybridLM) -> None:
    request = Request(tuple(range(2, 23)), 9, Sampling(seed=4), num_samples=4)
    for steps in (0, 1, 3, 5):  # before the prompt is read, inside it, and after it
        engine = small_engine(model, slots=2)
        other = engine.submit(replace(request, num_samples=1))
        number = engine.submit(request)
        events = [event for _ in range(steps) for event in engine.step()]
        engine.cancel(number)
        engine.cancel(number)
        events += [event for _ in range(40) for event in engine.step()]
        answers = collect(events)
        assert [answers[number, k].finish for k in range(4)] == ["abort"] * 4
        assert len(answers[other, 0].tokens) == 9
        check_nothing_is_left(engine)


def test_a_text_that_begins_like_another_is_read_from_there(model: HybridLM) -> None:
    first = Request(tuple(range(30, 51)), 4, GREEDY)
    engine = small_engine(model, prefixes=8)
    answer = collect(list(engine.run([first])))[0, 0]
    assert engine.timing.prompt_tokens == 21
    longer = (*first.prompt, *answer.tokens, 5, 6, 7)  # the next turn of a conversation
    for text, count in ((longer, 4), ((*first.prompt[:16], 1, 2, 3), 3), (first.prompt, 5)):
        engine.timing.prompt_tokens = 0
        found = engine_tokens(engine, text)
        assert engine.timing.prompt_tokens == count
        assert found == engine_tokens(small_engine(model), text)
    check_nothing_is_left(engine)


def test_a_prefix_whose_experts_nobody_recorded_is_of_no_use_to_whom_needs_them(
    model: HybridLM,
) -> None:
    engine, text = small_engine(model, prefixes=8), tuple(range(30, 51))
    list(engine.run([Request(text, 2, GREEDY)]))
    engine.timing.prompt_tokens = 0
    [*_, event] = engine.run([Request((*text, 5, 6), 2, GREEDY, experts=True)])
    assert event.answer.experts is not None
    assert event.answer.experts.shape[0] == 21 + 2 + 1
    assert engine.timing.prompt_tokens == 23
    engine.timing.prompt_tokens = 0
    [*_, event] = engine.run([Request((*text, 5, 6, 7, 8), 2, GREEDY, experts=True)])
    assert event.answer.experts.shape[0] == 21 + 4 + 1
    assert engine.timing.prompt_tokens == 2


def test_a_text_that_was_read_again_leaves_a_prefix_with_its_own_experts(model: HybridLM) -> None:
    engine, text = small_engine(model, prefixes=8), tuple(range(30, 51))
    engine.submit(Request(text, 6, GREEDY, experts=True))
    while not engine.scheduler.running or not engine.scheduler.running[0].answer.tokens:
        engine.step()
    engine.prefixes.clear()  # as where blocks run out
    engine.scheduler.preempt(engine.scheduler.running[0])
    engine.step()  # the first piece again
    request = Request((*text[:8], 5, 6, 7), 6, GREEDY, experts=True)
    [*_, event] = engine.run([request])
    [*_, alone] = small_engine(model).run([request])
    assert event.answer.experts is not None
    assert event.answer.experts.shape[0] == 11 + 5
    assert event.answer.experts.equal(alone.answer.experts)


def engine_tokens(engine: Engine, text: tuple[int, ...]) -> list[int]:
    events = list(engine.run([Request(text, 6, Sampling(seed=1))]))
    return [event.token for event in events if event.token is not None]


@pytest.mark.parametrize("speculation", [None, Speculation("mtp", 2, adaptive=False)])
def test_no_slot_and_no_block_is_lost_over_many_requests(
    model: HybridLM, speculation: Speculation | None
) -> None:
    """With 10,000 requests: `tools/bench/generation.py leaks`."""
    engine = small_engine(model, slots=8, blocks=12, prefixes=2, speculation=speculation)
    generator = random.Random(3)
    for _ in range(10):
        numbers = [
            engine.submit(Request(prompt(generator, 9), 3, num_samples=generator.choice([1, 2])))
            for _ in range(10)
        ]
        for number in generator.sample(numbers, 2):
            engine.step()
            engine.cancel(number)
        while not engine.is_idle:
            engine.step()
    check_nothing_is_left(engine)


def test_copies_of_a_prompt_draw_differently_and_a_neighbor_changes_nothing() -> None:
    alone = requests_of([[3, 1, 4]], 10, Sampling(1.0, seed=7))
    among = requests_of([[1], [3, 1, 4], [5], [3, 1, 4]], 10, Sampling(1.0, seed=7))
    assert among[1] == alone[0]
    assert [request.sampling.seed for request in among] == [7, 7, 7, 8]
    first, second = (requests_of([[3]], 1, Sampling(1.0))[0].sampling.seed for _ in range(2))
    assert first != second


def test_a_request_that_can_never_fit_is_refused(model: HybridLM) -> None:
    engine = small_engine(model, blocks=5)
    with pytest.raises(UserError, match="are 21 tokens, but the cache has room for 20; ask for"):
        engine.submit(Request(tuple(range(11)), 10))
    with pytest.raises(UserError, match="stop strings need an engine with a tokenizer"):
        engine.submit(Request((1,), 10, stop=("x",)))
    assert len(engine_tokens(engine, tuple(range(14)))) == 6
    check_nothing_is_left(engine)


def test_the_cache_of_a_slot_and_a_block_is_as_large_as_said(model: HybridLM) -> None:
    cache = Cache(model.config, 3, blocks=7, block_size=4, dtype=torch.float64)
    # 1 Mamba-2 layer: 3 inputs of 72 channels, 6 x 5 x 7 states; 1 attention layer: 2 heads of 6
    assert cache.slot_bytes == (3 * 72 + 6 * 5 * 7) * 8
    assert cache.block_bytes == 2 * 4 * 2 * 6 * 8
    tensors = [t for layer in cache.layers if layer for t in vars(layer).values() if t is not None]
    held = sum(tensor.nbytes for tensor in tensors)
    assert held == 3 * cache.slot_bytes + 7 * cache.block_bytes


def test_run_leaves_other_requests_their_events_and_cancels_what_nobody_asks_for(
    model: HybridLM,
) -> None:
    engine = small_engine(model)
    request = Request((5, 3, 60), 6, GREEDY)
    other = engine.submit(replace(request, max_tokens=3))
    with pytest.raises(UserError, match="prompt 2 has token 61"):
        list(engine.run([request, Request((61,))]))
    mine = list(engine.run([request]))
    theirs = engine.step()
    assert {event.request for event in mine} & {other} == set()
    assert [event.token for event in theirs] == [event.token for event in mine[:3]]
    events = engine.run([request])
    next(events)
    events.close()
    assert [event.finish for event in engine.step()] == ["abort"]
    check_nothing_is_left(engine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_by_row_an_answer_is_the_same_to_the_bit_in_any_company(dtype: torch.dtype) -> None:
    model = build(dtype=torch.float32, hybrid_override_pattern="ME*")
    model.compute_dtype = dtype
    generator = random.Random(2)
    requests = [
        Request(prompt(generator, 40), 8, Sampling(seed=k), logprobs=True, num_samples=1 + k % 2)
        for k in range(12)
    ]
    view = decode_view(model, pack=True)
    engine = small_engine(view, slots=7, row_by_row=True)
    together = collect(list(engine.run(requests)))
    for number, request in enumerate(requests):
        alone = collect(list(small_engine(view, slots=1, row_by_row=True).run([request])))
        for sample in range(request.num_samples):
            assert together[number, sample] == alone[0, sample]


def test_prompts_of_many_lengths_pass_the_model_together(
    model: HybridLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(5)
    requests = [Request(prompt(generator, 30), 3, GREEDY) for _ in range(9)]
    wanted = collect(list(small_engine(model, 64, slots=9).run(requests)))
    passes: list[tuple[int, int]] = []
    extend = engine_module.extend

    def watched(model: HybridLM, rows: CachedRows, tokens: Tensor, **wanted: bool) -> Tensor:
        passes.append((tokens.shape[0], tokens.shape[1]))
        return extend(model, rows, tokens, **wanted)

    monkeypatch.setattr(engine_module, "extend", watched)
    engine = small_engine(model, 512, slots=9, prefixes=2, common_pieces=True)
    found = collect(list(engine.run(requests)))
    assert [found[key].tokens for key in wanted] == [one.tokens for one in wanted.values()]
    lengths = [len(request.prompt) for request in requests]
    assert len(set(lengths)) > 5
    # one pass for each power of two from 16 to 2; a single token is read with the answers
    read = [length for _, length in passes if length > 1]
    assert read == [16, 8, 4, 2]
    assert sum(rows * length for rows, length in passes) == sum(lengths) + 2 * len(requests)
    # states are kept after whole prompts alone
    assert engine.prefixes.find(requests[-1].prompt[:15], with_experts=False) is None
