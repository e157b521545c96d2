"""Jobs on two ranks that died or were rolled back: going on gives the bits of one that did not."""

import signal

import pytest

from tests.support.job import Job
from tests.support.same_run import assert_same_run

pytestmark = [pytest.mark.distributed, pytest.mark.waits(10)]


def test_a_job_of_which_one_rank_was_killed_resumes_to_the_same_bits(on_two):
    whole = Job(on_two("whole"))
    assert whole.wait() == [0, 0], whole.text()
    killed = Job(on_two("killed", faults=({"kind": "kill", "step": 6, "rank": 1},)))
    codes = killed.wait()
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, 75)
    again = Job(on_two("killed"), "--resume")
    assert again.wait() == [0, 0], again.text()
    assert "resumed at step 4" in again.text()
    assert_same_run(again.run, whole.run)


def test_two_ranks_roll_back_alike_and_a_stopped_job_resumes_to_the_same_bits(on_two):
    # on one rank only: the reduced gradients tell the other
    faults = [{"kind": "nan_gradient", "step": step, "rank": 1} for step in (5, 6)]
    changes = {
        "reliability": {"rollback_after": 2, "faults": faults, "check_replicas_every_steps": 1},
        "parallel": {"dp_replicate": 2},
    }
    whole = Job(on_two("whole", **changes))
    assert whole.wait() == [0, 0], whole.text()
    assert "2 steps from 5 to 6 were skipped; rolled back to step-00000004" in whole.text()
    parts = Job(on_two("parts", **changes), "--stop-at", "6")
    assert parts.wait() == [75, 75], parts.text()
    parts = Job(on_two("parts", **changes), "--resume")
    assert parts.wait() == [0, 0], parts.text()
    assert_same_run(parts.run, whole.run)
