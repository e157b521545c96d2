"""Ranks that hang, fail, die or are asked to stop: what becomes of the job."""

import json
import signal
import time

import pytest

from nemotron.run.metrics import read_metrics
from tests.support.job import Job, limits

pytestmark = [pytest.mark.distributed, pytest.mark.waits(50)]

START_S = 60.0
LATEST_S = 0.75 * START_S
"""Who ends before so many seconds was not ended by the limit of a start."""


@pytest.mark.nightly
def test_a_rank_that_hangs_ends_the_job_and_is_named(on_two):
    job = Job(
        on_two("hangs", faults=({"kind": "hang", "step": 3, "rank": 1},), parallel=limits(START_S))
    )
    job.wait_for_step(2)
    start = time.monotonic()
    assert job.wait() == [1, 1], job.text()
    assert time.monotonic() - start < LATEST_S
    text = " ".join(job.text().split())
    assert "nemotron: rank 1 is behind, in step 3 (data) for" in text
    assert "rank 0 waits in gloo:all_reduce" in text
    assert "(step 3 (wait)); the job ends" in text
    for rank in (0, 1):
        folder = job.run / "ranks" / f"rank-{rank}"
        assert "trainer.py" in (folder / "stacks.txt").read_text()
        assert json.loads((folder / "flight.json").read_text())["entries"]
    assert "rank 1 is behind" in (job.run / "log.txt").read_text()
    status = json.loads((job.run / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["exit_code"] == 1


@pytest.mark.nightly
def test_a_rank_that_does_not_answer_is_named_with_its_last_place(on_two):
    job = Job(on_two("frozen", steps=4000, checkpoint={}, parallel=limits(START_S)))
    job.wait_for_step(2)
    job.processes[1].send_signal(signal.SIGSTOP)
    try:
        assert job.processes[0].wait(60) == 1
    finally:
        job.end()
    assert "nemotron: rank 1 does not answer, last seen in" in job.text()


def test_a_first_rank_that_is_frozen_with_the_store_is_noticed_by_the_others(on_two):
    job = Job(on_two("frozen_store", steps=4000, checkpoint={}, parallel=limits(START_S)))
    job.wait_for_step(2)
    job.processes[0].send_signal(signal.SIGSTOP)
    start = time.monotonic()
    assert job.processes[1].wait(60) == 1
    assert time.monotonic() - start < LATEST_S
    said = " ".join(job.processes[1].text.split())
    assert "nemotron: rank 0, which holds the store of the ranks at 127.0.0.1:" in said
    assert "does not answer; this rank waits in gloo:" in said
    assert json.loads((job.run / "status.json").read_text())["state"] == "failed"
    # whoever lets it go on gets a sentence from it, too
    job.processes[0].send_signal(signal.SIGCONT)
    assert job.wait() == [1, 1], job.text()
    assert "nemotron: " in job.processes[0].text
    assert "Traceback" not in job.text()


def test_a_rank_that_fails_ends_the_job_at_once_with_its_error(on_two):
    parallel = {"timeout_s": START_S, "start_timeout_s": START_S}
    faults = ({"kind": "raise", "step": 3, "rank": 1},)
    job = Job(on_two("fails", faults=faults, parallel=parallel))
    job.wait_for_step(2)
    start = time.monotonic()
    codes = job.wait()
    assert time.monotonic() - start < LATEST_S
    assert 0 not in codes
    text = job.text()
    assert "rank 1 failed in step 3 (data): InjectedFault: injected, as the recipe asks" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(on_two, number):
    job = Job(on_two("stopped", steps=4000))
    job.wait_for_step(3)
    job.processes[1].send_signal(number)
    assert job.wait() == [75, 75], job.text()
    done = read_metrics(job.run / "metrics.jsonl")[-1]["step"]
    assert f"stopped by {number.name} on rank 1 after step {done} of 4000, saved" in job.text()
    assert (job.run / "checkpoints" / f"step-{done:08d}" / "manifest.json").exists()
    other = (job.run / "ranks" / "rank-1.log").read_text()
    assert f"stopped by {number.name} after step {done} of 4000, saved" in other
