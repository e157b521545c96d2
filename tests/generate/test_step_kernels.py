"""Steps of one token by kernels for a GPU, here in Triton's interpreter, against the layers."""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemotron.generate.decode_layers import decode_view
from nemotron.generate.engine import Engine
from nemotron.generate.expert_layers import MoEStep
from nemotron.generate.parity import check_parity
from nemotron.generate.request import Request
from nemotron.generate.sampling import Sampling
from nemotron.model.cache_formats import CacheFormats
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import apply
from nemotron.ops.config import OpsConfig
from nemotron.ops.expert_step import expert_step
from nemotron.ops.mamba_step import mamba_step
from nemotron.ops.router_step import router_step
from tests.generate.conftest import build_model
from tests.support.cases import further

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = (mamba_step, router_step, expert_step)
ELSEWHERE = {operation.name: "reference" for operation in STEPS}
HERE = {operation.name: "triton" for operation in STEPS}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Let these kernels take CPU tensors, and count what they compute."""
    counted: Counter[str] = Counter()

    def spy(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            counted[name] += 1
            return function(*arguments)

        return call

    for operation in STEPS:
        first, *others = operation.backends
        assert first.name == "triton"
        if not torch.cuda.is_available():
            first = replace(first, devices=frozenset({"cpu"}))
        first = replace(first, function=spy(operation.name, first.function))
        monkeypatch.setattr(operation, "backends", [first, *others])
        monkeypatch.setattr(operation, "_chosen", {})
    return counted


def prepared(model: HybridLM, **ops: str) -> HybridLM:
    """Return a view for decoding with these kernels; `ops` are put in afterwards."""
    model = copy.deepcopy(model).to(DEVICE)
    apply(model, OpsConfig(token_step="reference", **HERE))
    view = decode_view(model, pack=True)
    apply(view, OpsConfig(token_step="reference", **(HERE | ops)))
    return view


def answers(engine: Engine) -> list[tuple[list[int], Any, list[float]]]:
    """Return tokens, experts and log-probabilities of greedy answers of several lengths."""
    g = torch.Generator().manual_seed(5)
    requests = [
        Request(
            tuple(torch.randint(61, (3 + 2 * k,), generator=g).tolist()),
            2 + 2 * (k % 2),
            Sampling(0.0),
            experts=True,
            logprobs=True,
        )
        for k in range(3)
    ]
    ended = [event for event in engine.run(requests) if event.finish]
    ended.sort(key=lambda event: event.request)
    found = [event.answer for event in ended]
    return [(a.tokens, a.experts.tolist(), a.raw_logprobs) for a in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("formats", "fixed_sizes"),
    [
        (CacheFormats(), True),
        further((CacheFormats(), False)),
        further((CacheFormats(state="fp16"), True)),
    ],
    ids=str,
)
def test_answers_are_those_of_the_layers(
    model: HybridLM, calls: Counter[str], formats: CacheFormats, fixed_sizes: bool
):
    # a slot changes hands; with fixed sizes another one fills steps up
    settings: dict[str, Any] = {"slots": 2, "formats": formats, "fixed_sizes": fixed_sizes}
    expected = answers(Engine(prepared(model, **ELSEWHERE), **settings))
    assert not calls
    found = answers(Engine(prepared(model), **settings))
    assert calls.keys() == ELSEWHERE.keys()
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        # another order of float32 sums; one bit of a state of 16 bits
        limit = 1e-5 if formats.state == "fp32" else 5e-3
        assert ours[2] == pytest.approx(theirs[2], abs=limit)


@pytest.mark.slow
def test_probabilities_are_those_of_training(model: HybridLM, calls: Counter[str]):
    apply(used := copy.deepcopy(model).to(DEVICE), OpsConfig(token_step="reference", **HERE))
    for parity in check_parity(used, [3], [2], 2):
        assert parity.largest <= 1e-4
    assert calls.keys() == ELSEWHERE.keys()


def test_replay_is_left_to_its_own_layers(calls: Counter[str]):
    [parity, _] = check_parity(build_model(), [5], [1], 3, mamba_decode="replay")
    assert parity.largest == 0
    assert not calls


def test_many_tokens_are_computed_as_in_training(model: HybridLM, calls: Counter[str]):
    view = prepared(model)
    with torch.inference_mode():
        view(torch.zeros(1, 300, dtype=torch.int64, device=view.backbone.embeddings.weight.device))
    assert not calls


def test_gradients_and_statistics_come_from_training_s_own_code(
    model: HybridLM, calls: Counter[str]
):
    view = prepared(model)
    layer = next(module for module in view.modules() if isinstance(module, MoEStep))
    x = torch.randn(1, 3, 24, device=view.backbone.embeddings.weight.device)
    with torch.no_grad():
        plain, none = layer(x)
        assert calls["expert_step"] == 1
        stats_too, stats = layer(x, "layer")
    assert calls["expert_step"] == 1
    assert none is None
    assert stats is not None
    assert layer(x.requires_grad_())[0].requires_grad
    assert calls["expert_step"] == 1
    # another order of float32 sums
    assert torch.allclose(plain, stats_too, rtol=1e-4, atol=1e-5)


def test_kernels_that_no_recipe_names_are_not_used(calls: Counter[str], model: HybridLM):
    used = copy.deepcopy(model).to(DEVICE)
    apply(used, OpsConfig(token_step="reference"))
    answers(Engine(used, slots=2))
    assert not calls
