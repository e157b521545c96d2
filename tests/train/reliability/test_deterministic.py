"""The deterministic mode: on while a run lasts, and the same bits in two runs."""

from pathlib import Path

import pytest
import torch

from nemotron.errors import UserError
from nemotron.train.reliability.deterministic import WORKSPACE, deterministic
from nemotron.train.start import train
from tests.support.same_run import assert_same_run


def settings() -> tuple[bool, bool, bool, bool]:
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic
    on = torch.are_deterministic_algorithms_enabled()
    return on, cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory


def test_it_is_on_inside_and_as_before_outside():
    before = settings()
    with deterministic(torch.device("cpu"), on=True):
        assert settings() == (True, True, False, False)
    assert settings() == before
    with deterministic(torch.device("cpu"), on=False):
        assert settings() == before


def test_on_a_gpu_it_says_what_cublas_needs(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    needs = r"needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment; set it before the start\."
    with (
        pytest.raises(UserError, match=needs),
        deterministic(torch.device("cuda"), on=True),
    ):
        pass
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    before = settings()
    with deterministic(torch.device("cuda"), on=True):
        pass
    assert settings() == before


@pytest.mark.slow
def test_two_deterministic_runs_have_the_same_bits(recipe):
    runs = []
    for name in ("first", "second"):
        config = recipe(name, reliability={"deterministic": True})
        assert train(config) == 0
        runs.append(Path(config.output) / name)
    assert_same_run(*runs)
