"""The batch script: who is started how, and what becomes of the job, with a stand-in trainer."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.cluster import ROOT, Cluster, both_run, records, state, wait_until

pytestmark = [pytest.mark.distributed, pytest.mark.waits(20)]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run"


def recipe(run: Path) -> list[str]:
    return ["some.yaml", f"output={run.parent}"]


def test_a_finished_run_is_not_requeued_and_ranks_know_their_place(cluster: Cluster, run: Path):
    job = cluster.start(*recipe(run), "note=with a space", PLAY="done", RANK="7", WORLD_SIZE="9")
    assert job.wait() == 0, job.text
    assert cluster.requeues == 0
    port = str(10000 + 2 * int(cluster.env["SLURM_JOB_ID"]) % 20000)
    for rank, record in enumerate(records(run, 0)):
        assert record == {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "arguments": [*recipe(run), "note=with a space", "--resume"],
        }
    assert len(records(run, 0)) == 2


def test_the_warning_stops_both_ranks_and_the_requeued_job_finishes(cluster: Cluster, run: Path):
    job = cluster.start(*recipe(run), PLAY="stop,done")
    wait_until(both_run(run), "both ranks run")
    job.signal(signal.SIGUSR1)
    assert job.wait() == 75, job.text
    assert state(run) == "stopped"
    assert cluster.requeues == 1
    again = cluster.start(*recipe(run), restart=1, PLAY="stop,done")
    assert again.wait() == 0, again.text
    assert cluster.requeues == 1
    assert "--resume" in records(run, 1)[1]["arguments"]


def test_a_warning_while_ranks_start_kills_none_and_is_repeated(cluster: Cluster, run: Path):
    job = cluster.start(*recipe(run), PLAY="late")
    wait_until(lambda: len(list(run.parent.glob("run.logs/*/*.pid"))) == 2, "both are starting")
    job.signal(signal.SIGUSR1)
    assert job.wait() == 75, job.text
    assert state(run) == "stopped"
    assert cluster.requeues == 1


def test_a_job_that_is_told_to_end_saves_and_stays_away(cluster: Cluster, run: Path):
    job = cluster.start(*recipe(run), PLAY="stop")
    wait_until(both_run(run), "both ranks run")
    job.signal(signal.SIGTERM)
    assert job.wait() == 75, job.text
    assert state(run) == "stopped"
    assert cluster.requeues == 0


def test_a_run_whose_recipe_limits_its_time_is_requeued(cluster: Cluster, run: Path):
    job = cluster.start(*recipe(run), PLAY="timed,done")
    assert job.wait() == 75, job.text
    assert cluster.requeues == 1
    again = cluster.start(*recipe(run), restart=1, PLAY="timed,done")
    assert again.wait() == 0, again.text
    assert cluster.requeues == 1


def test_a_killed_rank_brings_the_job_back(cluster: Cluster, run: Path):
    job = cluster.start(*recipe(run), PLAY="die")
    assert job.wait() == 1, job.text
    assert cluster.requeues == 1
    assert "rank 1 ended first, with exit code 137" in job.text
    assert "rank 1 has seen enough" in job.text


@pytest.mark.parametrize(
    ("limit", "restart", "expected"), [("3", 2, 1), ("3", 3, 0)], ids=["below", "reached"]
)
def test_restarts_have_a_limit(
    cluster: Cluster, run: Path, limit: str, restart: int, expected: int
):
    job = cluster.start(*recipe(run), restart=restart, PLAY="die", MAX_RESTARTS=limit)
    assert job.wait() == 1
    assert cluster.requeues == expected
    assert ("MAX_RESTARTS=3 is reached" in job.text) == (expected == 0)


def test_a_cancelled_job_does_not_come_back(cluster: Cluster, run: Path):
    job = cluster.start(*recipe(run), PLAY="die", JOB_STATE="CANCELLED")
    assert job.wait() == 1
    assert cluster.requeues == 0
    assert "the job was cancelled" in job.text


def test_a_mistake_ends_the_job_for_good(cluster: Cluster, run: Path):
    job = cluster.start(*recipe(run), PLAY="mistake")
    assert job.wait() == 2, job.text
    assert "found a mistake" in job.text
    assert cluster.requeues == 0


def test_a_wrong_recipe_starts_no_rank(cluster: Cluster, run: Path):
    job = cluster.start("wrong.txt", f"output={run.parent}", PLAY="done")
    assert job.wait() == 2, job.text
    assert "wrong.txt is no recipe" in job.text
    assert len(cluster.calls("srun")) == 1
    assert cluster.requeues == 0


def test_an_old_marker_does_not_speak_for_a_start_that_died(cluster: Cluster, run: Path):
    assert cluster.start(*recipe(run), PLAY="done").wait() == 0
    # this one dies before it writes a marker of its own
    broken = cluster.start(*recipe(run), restart=1, PLAY="done,crash")
    assert broken.wait() == 1, broken.text
    assert cluster.requeues == 1


def test_an_array_is_a_chain_of_restarts(cluster: Cluster, run: Path):
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1"}
    first = cluster.start(*recipe(run), PLAY="stop", **array)
    wait_until(both_run(run), "both ranks run")
    first.signal(signal.SIGUSR1)
    assert first.wait() == 75, first.text
    assert cluster.requeues == 0
    assert cluster.calls("scancel") == []
    second = cluster.start(*recipe(run), PLAY="done", **array)
    assert second.wait() == 0, second.text
    # the rest has nothing to do
    assert cluster.calls("scancel") == [["--state=PENDING", "40"]]


def test_ranks_that_do_not_fit_together_do_not_train(cluster: Cluster, run: Path):
    job = cluster.start(*recipe(run), PLAY="done", SKIP_DOCTOR="", DOCTOR="1")
    assert job.wait() == 1, job.text
    assert not run.exists()
    # another allocation may be sound
    assert cluster.requeues == 1
    sound = cluster.start(*recipe(run), PLAY="done", SKIP_DOCTOR="", DOCTOR="0")
    assert sound.wait() == 0, sound.text


def test_a_container_goes_to_every_step(cluster: Cluster, run: Path):
    job = cluster.start(*recipe(run), PLAY="done", CONTAINER_IMAGE="some/image:1")
    assert job.wait() == 0, job.text
    options = [call[0] for call in cluster.calls("srun")]
    assert len(options) == 2
    for given in options:
        assert given["--container-image"] == "some/image:1"
        assert given["--container-workdir"] == str(cluster.folder)
        assert given["--container-mounts"] == f"{cluster.folder}:{cluster.folder}"


def test_sbatch_reads_a_warning_and_requeue_from_the_script():
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    # sbatch stops reading at the first line that is no comment
    head = lines[: lines.index("set -euo pipefail")]
    assert "#SBATCH --signal=B:USR1@180" in head
    assert "#SBATCH --requeue" in head
    assert all(line.startswith("#") for line in head)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = ["rank.sh", "torchrun.sh", "slurm.sbatch"]  # each with what it sources
    subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT / "launch", check=True)
