"""The check that engine and model agree: it passes, and it notices a faulty state."""

import pytest
import torch

from nemotron.generate.parity import check_parity, report
from nemotron.model.hybrid import HybridLM
from nemotron.model.state import AttentionState, MambaState
from tests.support.models import build


@pytest.fixture(scope="module")
def model() -> HybridLM:
    model = build(dtype=torch.float32)
    return model


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
    model: HybridLM,
    fault: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report(model, (20,), (1,), 12) == 0
    assert "above" not in capsys.readouterr().out
    monkeypatch.setattr(MambaState, "store", fault)
    assert report(model, (20,), (1,), 12) == 1
    assert "above 1.05" in capsys.readouterr().out


def test_a_lost_key_is_noticed(model: HybridLM, monkeypatch: pytest.MonkeyPatch) -> None:
    append = AttentionState.append

    def lose(state: AttentionState, k: torch.Tensor, v: torch.Tensor) -> object:
        return append(state, k, v.roll(1, dims=-1) if v.shape[1] == 1 else v)

    monkeypatch.setattr(AttentionState, "append", lose)
    [greedy, sampled] = check_parity(model, (20,), (1,), 12)
    assert max(greedy.largest, sampled.largest) > 1e-3
