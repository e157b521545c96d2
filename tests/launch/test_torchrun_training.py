"""One machine, the real trainer on two ranks: stop, mistake, resume."""

import json
import signal
from pathlib import Path

import pytest

from tests.support.cluster import (
    SHORT,
    SMOKE,
    TORCHRUN,
    Launched,
    clean_environment,
    num_logged,
    state,
    wait_until,
)
from tests.support.embedded import fill_cache
from tests.support.quick_python import environment

pytestmark = [pytest.mark.distributed, pytest.mark.waits(15)]


def start(folder: Path, *words: str, quick: bool = True) -> Launched:
    env = clean_environment() | (environment() if quick else {}) | {"OMP_NUM_THREADS": "1"}
    return Launched([str(TORCHRUN), "-n", "2", str(SMOKE), *SHORT, *words], env, folder)


def test_a_run_on_two_ranks_is_stopped_refused_and_resumed(tmp_path: Path):
    run = tmp_path / "runs" / "smoke"
    fill_cache(tmp_path / "runs" / ".cache")
    launched = start(tmp_path)
    wait_until(lambda: num_logged(run) >= 2, "two steps are done", launched)
    launched.signal(signal.SIGUSR1)
    assert launched.wait() == 75, launched.text
    assert state(run) == "stopped"
    assert json.loads((run / "status.json").read_text())["step"] < 24
    refused = start(tmp_path)
    assert refused.wait() == 2, refused.text
    assert "add --resume" in refused.text
    resumed = start(tmp_path, "--resume")
    assert resumed.wait() == 0, resumed.text
    assert state(run) == "done"
    assert json.loads((run / "status.json").read_text())["step"] == 24


@pytest.mark.nightly
def test_a_layout_for_another_number_of_ranks_is_a_mistake(tmp_path: Path):
    launched = start(tmp_path, "parallel.dp_shard=3")
    assert launched.wait() == 2, launched.text
    assert "there are 2 processes" in launched.text
    assert not (tmp_path / "runs").exists()


@pytest.mark.nightly
def test_a_dry_run_checks_the_layout_of_all_ranks(tmp_path: Path):
    fine = start(tmp_path, "--dry-run")
    assert fine.wait() == 0, fine.text
    wrong = start(tmp_path, "parallel.dp_shard=3", "--dry-run", quick=False)
    assert wrong.wait() == 2, wrong.text
    assert not (tmp_path / "runs").exists()
