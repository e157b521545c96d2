"""Two hosts whose link is cut or slowed: every rank ends with a sentence, and the rest resumes."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron.checkpoint.find import SAVING
from nemotron.run.metrics import read_metrics
from tests.support.cases import further
from tests.support.hosts import Host, two_hosts
from tests.support.job import Job, busy, limits
from tests.support.same_run import assert_same_run
from tests.support.torchrun import TorchrunJob

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.waits(90)]


@pytest.fixture
def parallel() -> dict[str, float]:
    """Limits of steps, and of starts, which are those of saves, too."""
    return limits(20.0 * min(3.0, busy()))


@pytest.fixture
def bound_s(parallel) -> float:
    """The longest of them, that of the store, and of the answers to an alarm; the rest is load."""
    return parallel["start_timeout_s"] + 3 * parallel["timeout_s"] + 30.0 * busy()


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as hosts:
        yield hosts


def wait_for_save(job: Job | TorchrunJob) -> None:
    """Wait until a checkpoint is being written."""
    folder = job.run / "checkpoints"
    while not [*folder.glob(f"{SAVING}*")]:
        assert job.is_running
        time.sleep(0.0005)


@pytest.mark.parametrize("moment", [further("step"), further("save")])
def test_a_link_that_is_cut_ends_both_hosts_and_the_one_that_is_left_resumes(
    on_two, hosts, parallel, bound_s, moment
):
    config = on_two("cut", steps=400, checkpoint={"every_steps": 3, "keep": 2}, parallel=parallel)
    job = Job(config, hosts=hosts)
    job.wait_for_step(4)
    if moment == "save":
        wait_for_save(job)
    start = time.monotonic()
    hosts[1].unplug()
    assert job.wait(bound_s) == [1, 1], job.text()
    assert time.monotonic() - start < bound_s
    said = [" ".join(process.text.split()) for process in job.processes]
    assert "nemotron: rank 1 does not answer, last seen in step" in said[0]
    assert f"rank 0, which holds the store of the ranks at {hosts[0].address}:" in said[1]
    assert json.loads((job.run / "status.json").read_text())["state"] == "failed"
    left = Job(config, "--resume", "--stop-at", "20", world=1, hosts=hosts[:1])
    assert left.wait() == [75], left.text()
    assert "resumed at step " in left.text()


@pytest.mark.nightly
def test_a_host_that_is_lost_in_a_save_ends_the_other_and_costs_no_checkpoint(
    on_two, hosts, parallel, bound_s
):
    config = on_two("lost", steps=400, checkpoint={"every_steps": 3, "keep": 2}, parallel=parallel)
    job = Job(config, hosts=hosts)
    job.wait_for_step(4)
    wait_for_save(job)
    hosts[1].unplug()  # a host without power says no farewell
    job.processes[1].send_signal(signal.SIGKILL)
    assert job.processes[0].wait(bound_s) == 1
    assert "nemotron: rank 1 does not answer, last seen in step" in job.processes[0].text
    left = Job(config, "--resume", "--stop-at", "20", world=1, hosts=hosts[:1])
    assert left.wait() == [75], left.text()
    assert "resumed at step " in left.text()


@pytest.mark.nightly
def test_a_slow_link_costs_time_and_no_bit_and_a_far_too_slow_one_ends_the_job(
    on_two, hosts, parallel, bound_s
):
    whole = Job(on_two("whole"))
    assert whole.wait() == [0, 0], whole.text()
    hosts[0].slow_down("40mbit")
    slow = Job(on_two("slow"), hosts=hosts)
    assert slow.wait() == [0, 0], slow.text()
    assert_same_run(slow.run, whole.run)
    hosts[0].speed_up()
    crawling = Job(on_two("crawling", steps=400, parallel=parallel), hosts=hosts)
    crawling.wait_for_step(2)
    hosts[0].slow_down("40kbit")
    assert crawling.wait(2 * bound_s) == [1, 1], crawling.text()
    assert "nemotron: " in crawling.processes[0].text
    assert "nemotron: " in crawling.processes[1].text or "wait" in crawling.processes[0].text


@pytest.mark.nightly
def test_a_link_that_delays_and_loses_packets_costs_time_and_no_bit(on_two, hosts):
    hosts[0].delay(10, lost_percent=1.0)
    late = Job(on_two("late"), hosts=hosts)
    assert late.wait() == [0, 0], late.text()
    whole = Job(on_two("whole"))
    assert whole.wait() == [0, 0], whole.text()
    assert_same_run(late.run, whole.run)


@pytest.mark.nightly
def test_under_torchrun_a_cut_link_and_a_lost_node_end_all_and_what_is_left_resumes(
    on_two, hosts, parallel, bound_s
):
    config = on_two("run", steps=400, checkpoint={"every_steps": 3, "keep": 2}, parallel=parallel)
    cut = TorchrunJob(config, hosts)
    cut.wait_for_step(4)
    wait_for_save(cut)
    hosts[1].unplug()
    assert cut.wait(bound_s) == [1, 1]
    assert "nemotron: rank 1 does not answer, last seen in step" in cut.texts[0]
    launcher = "the launcher of the first machine, which holds the store of the ranks at"
    assert f"nemotron: {launcher} {hosts[0].address}:" in cut.texts[1]
    hosts[1].plug()
    lost = TorchrunJob(config, hosts, "--resume")
    lost.wait_for_step(last_step(lost.run) + 2)
    hosts[1].unplug()  # a host without power
    lost.kill(1)
    assert lost.wait(bound_s)[0] == 1
    assert "nemotron: rank 1 does not answer, last seen in step" in lost.texts[0]
    assert json.loads((lost.run / "status.json").read_text())["state"] == "failed"
    stop = str(last_step(lost.run) + 5)
    left = TorchrunJob(config, hosts[:1], "--resume", "--stop-at", stop)
    left.wait(bound_s)
    assert "resumed at step " in left.texts[0]
    assert json.loads((left.run / "status.json").read_text())["state"] == "stopped"


def last_step(run: Path) -> int:
    return read_metrics(run / "metrics.jsonl")[-1]["step"]
