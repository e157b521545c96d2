"""The batch script with the real trainer on two ranks: warned, killed, and finished in the end."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.cluster import SHORT, SMOKE, Cluster, Launched, num_logged, state, wait_until
from tests.support.embedded import fill_cache
from tests.support.quick_client import SERVER
from tests.support.quick_python import environment

pytestmark = [pytest.mark.distributed, pytest.mark.waits(15)]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    fill_cache(tmp_path / "runs" / ".cache")
    cluster = Cluster(tmp_path)
    quick = environment()
    cluster.env |= {SERVER: quick[SERVER], "NEMOTRON": f"{quick['PYTHON_EXEC']} -m nemotron"}
    return cluster


def start(cluster: Cluster, **more) -> Launched:
    return cluster.start(SMOKE, *SHORT, "checkpoint.every_steps=3", **more)


@pytest.mark.nightly
def test_a_warned_run_is_requeued_and_finishes(cluster: Cluster):
    run = cluster.folder / "runs" / "smoke"
    job = start(cluster, SKIP_DOCTOR="")
    wait_until(lambda: num_logged(run) >= 2, "two steps are done", job)
    job.signal(signal.SIGUSR1)
    assert job.wait() == 75, job.text
    assert "ranks 2, machines 1: no difference" in job.text
    assert state(run) == "stopped"
    assert cluster.requeues == 1
    again = start(cluster, restart=1)
    assert again.wait() == 0, again.text
    assert state(run) == "done"
    assert "resumed at step" in again.text
    assert cluster.requeues == 1


@pytest.mark.nightly
def test_a_run_that_limits_its_own_time_is_requeued_and_finishes(cluster: Cluster):
    words = (SMOKE, *SHORT, "stop.after_minutes=1e-6")
    job = cluster.start(*words)
    assert job.wait() == 75, job.text
    assert "stopped by stop.after_minutes = 1e-06 after step 1 of " in job.text
    assert cluster.requeues == 1
    again = cluster.start(*words, "stop.after_minutes=60", restart=1)
    assert again.wait() == 0, again.text
    assert "resumed at step 1" in again.text
    assert state(cluster.folder / "runs" / "smoke") == "done"
    assert cluster.requeues == 1


@pytest.mark.nightly
def test_a_killed_rank_is_requeued_and_goes_on_from_a_checkpoint(cluster: Cluster):
    run = cluster.folder / "runs" / "smoke"
    job = start(cluster)
    wait_until(lambda: num_logged(run) >= 8, "a checkpoint is there", job)
    [keeper] = (cluster.folder / "runs" / "smoke.logs").glob("*/rank-1.pid")
    wrapper = int(keeper.read_text())
    [trainer] = Path(f"/proc/{wrapper}/task/{wrapper}/children").read_text().split()
    os.kill(int(trainer), signal.SIGKILL)
    assert job.wait() == 1, job.text
    # the first rank notices that it lost the other, unless it is ended before
    assert state(run) in ("failed", "running")
    assert cluster.requeues == 1
    again = start(cluster, restart=1)
    assert again.wait() == 0, again.text
    assert "resumed at step" in again.text
    assert state(run) == "done"
