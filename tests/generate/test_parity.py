"""The check that engine and model agree: it passes, and it notices a faulty state."""

import copy

import pytest
import torch

from nemotron.errors import UserError
from nemotron.generate.engine import Engine
from nemotron.generate.exact import exact_view
from nemotron.generate.parity import check_parity, report
from nemotron.generate.request import Answer, Request
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from nemotron.generate.token_steps import TokenSteps
from nemotron.model.cached_rows import CachedRows
from nemotron.model.few_tokens import Inputs
from nemotron.model.hybrid import HybridLM
from nemotron.model.state import AttentionState, MambaSlots, MambaState
from nemotron.ops.token_step import token_step
from tests.support.models import build


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return build(dtype=torch.float32)


@pytest.fixture(scope="module")
def layered(model: HybridLM) -> HybridLM:
    """The same model, whose layers decode whether or not compiled steps are there."""
    layered = copy.deepcopy(model)
    layered.token_step = token_step.bind("reference")
    return layered


def test_engine_and_model_agree(model: HybridLM) -> None:
    found = list(check_parity(model, lengths=(5, 40), rows=(1, 3), new_tokens=12))
    assert len(found) == 2 * 2 * 2
    assert {(p.length, p.rows, p.sampled) for p in found} == {
        (length, rows, sampled)
        for length in (5, 40)
        for rows in (1, 3)
        for sampled in (True, False)
    }
    for parity in found:
        assert parity.largest <= 1e-4  # float32: other orders of sums
        assert 1 <= parity.error <= 1 + 1e-4
        assert parity.is_right


def forget_last_input(state: MambaState, conv: torch.Tensor, ssm: torch.Tensor) -> None:
    state.conv.copy_(conv.roll(1, dims=1))
    state.ssm.copy_(ssm)


def keep_old_state(state: MambaState, conv: torch.Tensor, ssm: torch.Tensor) -> None:
    state.conv.copy_(conv)
    state.ssm.copy_(0.5 * ssm)


@pytest.mark.parametrize("fault", [forget_last_input, keep_old_state])
def test_a_faulty_state_is_noticed(
    layered: HybridLM,
    fault: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report(layered, (20,), (1,), 12) == 0
    assert "above" not in capsys.readouterr().out
    monkeypatch.setattr(MambaState, "store", fault)
    assert report(layered, (20,), (1,), 12) == 1
    assert "above 1.05" in capsys.readouterr().out


def test_a_faulty_state_of_compiled_steps_is_noticed(
    model: HybridLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := token_step.backend("numba").missing():
        pytest.skip(reason)
    step, calls = TokenSteps.__call__, []

    def halve(
        steps: TokenSteps, model: HybridLM, tokens: torch.Tensor, rows: CachedRows, **wanted: bool
    ) -> torch.Tensor | None:
        hidden = step(steps, model, tokens, rows, **wanted)
        calls.append(hidden)
        for layer in rows.cache.layers:
            if isinstance(layer, MambaSlots):
                layer.ssm.mul_(0.5)
        return hidden

    monkeypatch.setattr(TokenSteps, "__call__", halve)
    assert report(model, (20,), (1,), 12) == 1
    assert calls
    assert all(hidden is not None for hidden in calls)


def test_a_lost_key_is_noticed(layered: HybridLM, monkeypatch: pytest.MonkeyPatch) -> None:
    append = AttentionState.append

    def lose(state: AttentionState, k: torch.Tensor, v: torch.Tensor) -> object:
        return append(state, k, v.roll(1, dims=-1) if v.shape[1] == 1 else v)

    monkeypatch.setattr(AttentionState, "append", lose)
    [greedy, sampled] = check_parity(layered, (20,), (1,), 12)
    assert max(greedy.largest, sampled.largest) > 1e-3


@pytest.fixture(scope="module")
def grown(model: HybridLM) -> HybridLM:
    """Wider than the tiles, so that libraries have a choice of orders."""
    return build(dtype=torch.float32, hybrid_override_pattern="ME*EM", hidden_size=128, head_dim=32)


@pytest.mark.slow
def test_with_replay_every_bit_is_that_of_one_pass(
    grown: HybridLM, capsys: pytest.CaptureFixture[str]
) -> None:
    found = list(check_parity(grown, (5, 70), (1, 3), 30, mamba_decode="replay"))
    assert [parity.largest for parity in found] == [0.0] * 8
    # without, some bits differ: the check could have seen it
    assert max(p.largest for p in check_parity(grown, (70,), (3,), 8)) > 0
    assert report(grown, (20,), (1,), 4, "replay") == 0
    assert "not 0" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_is_exact_where_operations_change_with_the_number_of_tokens(
    dtype: torch.dtype,
) -> None:
    """Norms take another formula from 2^17 elements on: here, from 257 tokens on."""
    model = build(dtype=torch.float32, hybrid_override_pattern="M*EM", hidden_size=512)
    model.compute_dtype = dtype
    found = list(check_parity(model, (257,), (2,), 2, mamba_decode="replay"))
    assert [parity.largest for parity in found] == [0.0] * 2
    with torch.no_grad():
        assert exact_view(model)(torch.ones(1, 3, dtype=torch.long)).dtype == dtype


@pytest.mark.slow
def test_replay_gives_the_same_bits_in_any_company_and_after_a_preemption(grown: HybridLM) -> None:
    requests = [
        Request(tuple(range(1 + k, 20 + 9 * k)), 30, Sampling(1.0, seed=k), logprobs=True)
        for k in range(3)
    ]

    def answers(requests: list[Request], **settings: object) -> list[Answer]:
        engine = Engine(grown, mamba_decode="replay", block_size=4, **settings)
        ended = [event for event in engine.run(requests) if event.finish]
        assert (engine.scheduler.num_preempted > 0) == (len(requests) > 1)
        return [event.answer for event in sorted(ended, key=lambda event: event.request)]

    together = answers(requests, slots=3, blocks=40, prefill_tokens=24, prefixes=2)
    assert together == [answers([request], slots=1)[0] for request in requests]


@pytest.mark.slow
def test_a_faulty_replay_is_noticed(grown: HybridLM, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Inputs.advance

    def slightly_wrong(inputs: Inputs, ssm: torch.Tensor, counts: torch.Tensor) -> None:
        advance(inputs, ssm, counts)
        if ssm.shape[0] == 3:  # the engine's three rows, not the pass
            ssm.mul_(1 + 1e-6)

    monkeypatch.setattr(Inputs, "advance", slightly_wrong)
    assert report(grown, (70,), (3,), 4, "replay") == 1


def test_replay_and_speculation_exclude_each_other(model: HybridLM) -> None:
    with pytest.raises(UserError, match="replay goes with neither speculation nor other formats"):
        Engine(model, mamba_decode="replay", speculation=Speculation())
