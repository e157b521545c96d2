"""Steps of fixed sizes against steps of the sizes that there are; on a GPU they are graphs."""

import pytest
import torch

from nemotron.generate.decode_layers import decode_view
from nemotron.generate.engine import Engine
from nemotron.generate.graphs import Steps
from nemotron.generate.request import Request
from nemotron.generate.sampling import Sampling
from nemotron.model.cache import Cache
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import apply
from nemotron.ops.config import OpsConfig
from tests.generate.conftest import build_model

# float32: other sizes of products have another order of sums; the largest seen is 1e-6
TOLERANCE = 1e-5


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(sum(shape)))


def a_cache(model: HybridLM, slots: int, **settings: int) -> Cache:
    weight = model.backbone.embeddings.weight
    return Cache(
        model.config,
        slots,
        dtype=model.compute_dtype or weight.dtype,
        device=weight.device,
        **settings,
    )


@torch.inference_mode()
def both(model: HybridLM, lengths: list[int], order: list[int], new: int) -> float:
    """Return the largest difference of logits over `new` steps, texts in slots in some order."""
    ids = random_ids(len(lengths), max(lengths) + new)
    fixed, free = (a_cache(model, 9, block_size=4) for _ in range(2))
    steps, device = Steps(fixed), fixed.device
    places: dict[Cache, list[int]] = {}
    for cache in (fixed, free):
        slots = [cache.admit() for _ in lengths]
        places[cache] = [slots[number] for number in order]
        for slot, length, row in zip(places[cache], lengths, ids, strict=True):
            model(row[None, :length].to(device), cache=CachedRows(cache, [slot]))
    worst = 0.0
    for step in range(new):
        tokens = [int(row[length + step]) for row, length in zip(ids, lengths, strict=True)]
        ours = steps.append(model, places[fixed], tokens).logits
        given = torch.tensor(tokens, device=device)[:, None]
        theirs = model.logits(model(given, cache=CachedRows(free, places[free]))[:, -1])
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
        assert [fixed.lengths[slot] for slot in places[fixed]] == [n + step + 1 for n in lengths]
    return worst


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("lengths", "order"),
    [
        ([9], [0]),
        ([3, 14], [0, 1]),
        ([3, 14], [1, 0]),
        ([5, 1, 8], [0, 1, 2]),
        ([2, 3, 4, 5, 11], [4, 2, 0, 1, 3]),
    ],
)
def test_steps_of_fixed_sizes_are_the_usual_ones(
    model: HybridLM, lengths: list[int], order: list[int], prepared: bool
) -> None:
    used = decode_view(model, pack=True) if prepared else model
    assert both(used, lengths, order, new=9) <= TOLERANCE


def test_rows_that_fill_up_change_no_text(model: HybridLM) -> None:
    cache = a_cache(model, 5, block_size=4)
    steps = Steps(cache)
    slots = [cache.admit() for _ in range(4)]
    with torch.inference_mode():
        for slot in slots:
            model(random_ids(1, 6), cache=CachedRows(cache, [slot]))
    left = cache.snapshot(slots[3])
    steps.append(model, slots[:3], [1, 2, 3])  # rounded up to four
    after = cache.snapshot(slots[3])
    for old, new in zip(left.states, after.states, strict=True):
        assert all(map(torch.equal, old, new))


def answers(engine: Engine) -> list[tuple[list[int], list[int] | None]]:
    """Return the tokens of each answer, and of every second request their experts."""
    sampling = [Sampling(0.0), Sampling(0.8, top_p=0.9, seed=3), Sampling(1.0, top_k=5, seed=4)]
    requests = [
        Request(
            random_ids(1, 2 + 3 * k)[0].tolist(),
            4 + 2 * k,
            sampling[k % 3],
            1 + k % 2,
            experts=k % 2 == 0,
        )
        for k in range(7)
    ]
    ended = [event for event in engine.run(requests) if event.finish]
    ended.sort(key=lambda event: (event.request, event.sample))
    experts = [event.answer.experts for event in ended]
    assert any(each is not None for each in experts)
    return [
        (event.answer.tokens, None if each is None else each.tolist())
        for event, each in zip(ended, experts, strict=True)
    ]


@pytest.mark.parametrize("settings", [{}, {"slots": 3}, {"blocks": 9, "block_size": 8}])
def test_an_engine_answers_the_same(model: HybridLM, settings: dict[str, int]) -> None:
    engine = Engine(model, fixed_sizes=True, **settings)
    assert answers(engine) == answers(Engine(model, **settings))
    spare = len(engine.cache.lengths) - engine.cache.num_free_slots
    assert (spare, engine.cache.blocks.used) == (1, 1)


def on_gpu(width: int, experts: str = "auto") -> HybridLM:
    """Return a model whose experts' width 8 divides, or not: then the host counts their tokens."""
    model = build_model(16, width).cuda()
    model.compute_dtype = torch.bfloat16
    apply(model, OpsConfig(expert_step=experts))
    return decode_view(model, pack=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "order"), [([9], [0]), ([2, 3, 4, 5, 11], [4, 2, 0, 1, 3])])
@pytest.mark.parametrize("width", [16, 12])
def test_graphs_are_the_steps(width: int, lengths: list[int], order: list[int]) -> None:
    # bfloat16: a few steps of its rounding in the largest logit
    assert both(on_gpu(width), lengths, order, new=9) <= 3e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "experts", "captured"),
    [(16, "triton", True), (12, "triton", True), (16, "auto", True), (12, "auto", False)],
)
def test_an_engine_captures_what_needs_no_host(width: int, experts: str, captured: bool) -> None:
    engine = Engine(on_gpu(width, experts))
    assert len(answers(engine)) == 10
    assert engine._steps is not None
    found = {step._graph is not None for step in engine._steps._steps.values()}
    assert found == {captured}
