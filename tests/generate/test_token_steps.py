"""A step through all layers at once computes what the layers do, and each text by itself."""

import copy
import logging
import random
from collections.abc import Iterator

import pytest
import torch

from nemotron.errors import UserError
from nemotron.generate import token_steps
from nemotron.generate.decode_layers import lay_out, prepare_weights
from nemotron.generate.drafts import predict_ahead
from nemotron.generate.engine import Engine
from nemotron.generate.forward import append, extend, new_cache, read
from nemotron.generate.request import Request
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Source, Speculation
from nemotron.generate.token_steps import operation_of
from nemotron.model.ahead import RowsAhead
from nemotron.model.cache import Cache
from nemotron.model.cache_formats import CacheFormats
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import apply
from nemotron.ops.config import PRESETS, OpsConfig
from nemotron.ops.registry import Backend
from nemotron.ops.token_step import TokenStepOp, token_step
from nemotron.ops.token_step.stack import Matrix

PROMPTS = [[5, 3, 60, 1, 17, 17, 2], [9, 4], [8, 8, 30], [40], [2, 3, 4, 5, 6]]
GREEDY = Sampling(0.0)
NAMES = [backend.name for backend in token_step.backends]


def stepping(model: HybridLM, backend: str, dtype: torch.dtype = torch.float32) -> HybridLM:
    """Return a copy of the model that decodes by a backend of the operation."""
    if reason := token_step.backend(backend).missing():
        pytest.skip(reason)
    model = copy.deepcopy(model)
    model.compute_dtype = dtype
    operation = token_step.bind(backend)
    assert isinstance(operation, TokenStepOp)
    model.token_step = operation
    lay_out(model, dtype, operation)
    return model


def continued(model: HybridLM, lengths: tuple[int, ...] = (1, 19, 1)) -> tuple[torch.Tensor, Cache]:
    """Return the hidden states of some tokens after the prompts, and the cache after them."""
    rows, logits = read(model, PROMPTS)
    generator, found = torch.Generator().manual_seed(0), [logits]
    for length in lengths:
        tokens = torch.randint(61, (len(PROMPTS), length), generator=generator)
        found.append(extend(model, rows, tokens).flatten(0, 1))
    return torch.cat([part.float().flatten() for part in found]), rows.cache


def remembered(cache: Cache) -> Iterator[torch.Tensor]:
    for layer in filter(None, cache.layers):
        yield from (t.float() for t in vars(layer).values() if isinstance(t, torch.Tensor))


# float32: another order of sums; bfloat16: the layers round between them, a step does not
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
@pytest.mark.parametrize("backend", NAMES)
def test_steps_give_what_the_layers_do(
    model: HybridLM, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    expected, cache = continued(model)
    stepped = stepping(model, backend, dtype)
    found, other = continued(stepped)
    assert stepped.steps is not None
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    for ours, theirs in zip(remembered(other), remembered(cache), strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("backend", NAMES)
def test_the_block_for_drafts_gives_what_its_layers_do(model: HybridLM, backend: str) -> None:
    generator, results = torch.Generator().manual_seed(4), []
    tokens = torch.randint(61, (3, 20), generator=generator)
    hidden = torch.randn(3, 20, 24, generator=generator)
    for each in (model, stepping(model, backend)):
        cache = new_cache(each, 4, block_size=8, drafts=2)
        rows = RowsAhead(cache, [cache.admit() for _ in range(3)], [1, 1, 1])
        with torch.inference_mode():
            first = predict_ahead(each, tokens[:, :19], hidden[:, :19], rows)
            second = predict_ahead(each, tokens[:, 19:], hidden[:, 19:], rows)
        assert rows.firsts == [21] * 3
        assert cache.ahead is not None
        kept = [pool.keys[cache.tables[2]] for pool in cache.ahead.layers if pool is not None]
        results.append([first, second, *(part.flatten(0, 1)[1:21] for part in kept)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_text_has_the_same_bits_in_any_company_cut_anywhere_on_any_threads(
    model: HybridLM, dtype: torch.dtype
) -> None:
    model = stepping(model, "numba", dtype)
    text = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 60, 59, 1, *range(2, 29)]
    rows, logits = read(model, [text])
    states = [t[0] for t in remembered(rows.cache)]
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            _, beside = read(model, [text[::-1]] * 6 + [text] + [text[::-1]])
            pieces, newest = read(model, [text[:2]])
            for begin, end in ((2, 3), (3, 8), (8, 40)):
                newest = append(model, pieces, torch.tensor([text[begin:end]]))
        finally:
            torch.set_num_threads(before)
        assert beside[6].equal(logits[0])
        assert newest[0].equal(logits[0])
        for layer, state in zip(remembered(pieces.cache), states, strict=True):
            assert layer[0].equal(state)
    assert not beside[0].equal(logits[0])


def answers(engine: Engine, requests: list[Request]) -> list[tuple[list[int], list[float]]]:
    ended = [event for event in engine.run(requests) if event.finish]
    ended.sort(key=lambda event: event.request)
    return [(event.answer.tokens, event.answer.raw_logprobs) for event in ended]


def test_an_answer_has_the_same_bits_whoever_comes_and_goes(model: HybridLM) -> None:
    model = stepping(model, "numba")
    generator = random.Random(3)
    requests = [
        Request(
            tuple(generator.randrange(61) for _ in range(generator.randint(1, 30))),
            generator.randint(1, 9),
            Sampling(generator.choice([0.0, 1.0]), seed=k),
            logprobs=True,
        )
        for k in range(12)
    ]
    # few blocks, so that some answers are read again
    together = Engine(model, (), 8, slots=5, blocks=14, block_size=4)
    found = answers(together, requests)
    assert together.scheduler.num_preempted
    for request, answer in zip(requests, found, strict=True):
        assert answers(Engine(model, slots=1), [request]) == [answer]


@pytest.mark.parametrize("source", ["lookup", "mtp"])
@pytest.mark.parametrize("backend", NAMES)
def test_drafts_change_no_bit_of_an_answer(model: HybridLM, backend: str, source: Source) -> None:
    model = stepping(model, backend)
    requests = [Request((3, 4, 3, 4, 3, *prompt), 12, GREEDY, logprobs=True) for prompt in PROMPTS]
    requests += [Request((5, 6), 20, GREEDY, forced=(9, 1, 9, 1, 9, 1, 9, 1), logprobs=True)]
    expected = answers(Engine(model), requests)
    engine = Engine(model, speculation=Speculation(source, 3, adaptive=False))
    found = answers(engine, requests)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    if backend == "numba":  # torch adds up other numbers of rows in other orders
        assert found == expected
    assert engine.speculator is not None
    assert engine.speculator.acceptance.num_accepted > 0


def test_experts_are_recorded_as_the_routers_choose_them(model: HybridLM) -> None:
    requests = [Request(tuple(prompt), 5, Sampling(0.0), experts=True) for prompt in PROMPTS]
    found = []
    for each in (stepping(model, "numba"), model):
        events = [event for event in Engine(each, slots=2).run(requests) if event.finish]
        found.append({event.request: event.answer.experts for event in events})
    steps, layers = found
    for number, experts in layers.items():
        assert experts is not None
        assert experts.sort(-1).values.equal(steps[number].sort(-1).values)


@pytest.mark.parametrize(
    "formats", [CacheFormats("fp16"), CacheFormats("fp16_sr"), CacheFormats(keys_values="fp8")]
)
def test_other_formats_of_the_cache_pass_the_layers(model: HybridLM, formats: CacheFormats) -> None:
    stepped = stepping(model, NAMES[0])
    requests = [Request(tuple(prompt), 6, Sampling(0.0), logprobs=True) for prompt in PROMPTS]
    expected = answers(Engine(model, formats=formats), requests)
    found = answers(Engine(stepped, formats=formats), requests)
    for (tokens, logprobs), (others, theirs) in zip(found, expected, strict=True):
        assert tokens == others
        # float32: another order of sums, rounded to coarser numbers a little differently
        assert logprobs == pytest.approx(theirs, abs=2e-2)


def test_a_copy_of_a_model_steps_by_itself(model: HybridLM) -> None:
    model = stepping(model, "numba")
    expected, _ = continued(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.matrix.blocks.zero_()
    assert continued(other)[0].equal(expected)
    assert not continued(model)[0].equal(expected)


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Backend) -> str | None:
        return "package numba is not installed (pip install numba)" if self.packages else None

    monkeypatch.setattr(Backend, "missing", missing)
    token_steps._say.cache_clear()


@pytest.mark.usefixtures("without_numba")
def test_without_the_package_the_layers_decode_and_say_so_once(
    model: HybridLM, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = continued(model)
    caplog.set_level(logging.WARNING, "nemotron")
    for _ in range(2):
        prepared = prepare_weights(copy.deepcopy(model))
        assert prepared.steps is None
    assert (continued(prepared)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    message = "numba is not used to decode: package numba is not installed (pip install numba)"
    assert [record.getMessage() for record in caplog.records] == [message]


@pytest.mark.usefixtures("without_numba")
def test_a_missing_package_is_refused_where_it_is_asked_for_by_name(model: HybridLM) -> None:
    with pytest.raises(UserError, match=r"ops.token_step = numba cannot be used: package numba is"):
        apply(copy.deepcopy(model), OpsConfig(token_step="numba"))


def test_a_model_that_a_step_does_not_know_is_refused_by_name_and_else_left_alone(
    model: HybridLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped = copy.deepcopy(model)
    object.__setattr__(grouped, "config", grouped.config.model_copy(update={"n_group": 5}))
    pinned = token_step.bind("reference")
    monkeypatch.setattr(pinned, "pinned", NAMES[0])
    grouped.token_step = pinned
    with pytest.raises(UserError, match="does not honor groups_of_experts"):
        prepare_weights(copy.deepcopy(grouped))
    grouped.token_step = token_step
    assert prepare_weights(grouped).steps is None


def test_weights_in_blocks_are_those_that_came() -> None:
    for shape in ((130, 7), (3, 64, 5)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        matrix = Matrix.of(weight, torch.float32)
        assert matrix.dense().equal(weight)
        assert matrix.blocks.shape[-1] == 64


def test_a_backend_that_is_named_inside_the_layers_is_used(model: HybridLM) -> None:
    if reason := token_step.backend("numba").missing():
        pytest.skip(reason)
    for choices, steps in (
        (OpsConfig(ssd="reference"), False),
        (OpsConfig(ssd="reference", token_step="numba"), True),
        (OpsConfig(linear_cross_entropy="reference"), True),
        (OpsConfig(**PRESETS["numba"]), True),
        (OpsConfig(**PRESETS["numba_int16"]), True),
        (OpsConfig(**PRESETS["numba"] | {"rms_norm": "fused"}), False),
    ):
        named = copy.deepcopy(model)
        apply(named, choices)
        assert (operation_of(named, torch.float32) is not None) == steps, choices
