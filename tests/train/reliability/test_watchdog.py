"""The sentence that says for whom a job waited, made of what its ranks answered."""

import pytest

from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.runtime import Ranks
from nemotron.train.reliability.progress import StepProgress
from nemotron.train.reliability.watchdog import Answer, Watchdog, pending_collective, verdict


def answer(phase: str, collective: str | None = None, *, step: int = 4, error: str | None = None):
    return Answer(step, phase, 12.3, collective, error)


def test_the_rank_at_the_earliest_place_is_behind():
    ahead = answer("exchange", "gloo:all_reduce")
    answers = {0: ahead, 1: answer("forward_backward", "gloo:all_gather of mesh_fsdp"), 2: ahead}
    assert verdict(answers, {}) == (
        "rank 1 is behind, in step 5 (forward_backward) for 12 s; "
        "ranks 0, 2 wait in gloo:all_reduce (step 5 (exchange))"
    )


def test_an_earlier_step_is_behind_a_later_one():
    answers = {0: answer("save", step=3), 1: answer("wait", "nccl:all_reduce", step=4)}
    assert verdict(answers, {}).startswith("rank 0 is behind, in step 4 (save)")


def test_of_ranks_at_the_same_place_the_one_outside_a_collective_is_behind():
    waits = answer("forward_backward", "gloo:all_gather")
    answers = {0: waits, 1: waits, 2: answer("forward_backward"), 3: answer("forward_backward")}
    assert verdict(answers, {}) == (
        "ranks 2, 3 are behind, in step 5 (forward_backward) for 12 s; "
        "ranks 0, 1 wait in gloo:all_gather (step 5 (forward_backward))"
    )


def test_when_all_wait_no_rank_is_accused():
    waits = answer("forward_backward", "gloo:all_gather")
    assert verdict({0: waits, 1: waits}, {}) == (
        "no rank moves, in step 5 (forward_backward) for 12 s; "
        "ranks 0, 1 wait in gloo:all_gather (step 5 (forward_backward))"
    )


def test_a_rank_without_an_answer_comes_before_one_that_is_behind():
    answers = {0: answer("wait", "gloo:all_reduce"), 2: answer("data")}
    text = verdict(answers, {1: "last seen in step 5 (data)"})
    assert text.startswith("rank 1 does not answer, last seen in step 5 (data); rank 0 waits in")


def test_an_error_says_more_than_a_place():
    answers = {0: answer("wait"), 1: answer("data", error="OSError: no space")}
    assert verdict(answers, {}) == "rank 1 failed in step 5 (data): OSError: no space"


def test_an_error_that_a_dead_rank_gives_to_others_is_not_theirs():
    answers = {0: answer("wait", error="RuntimeError: Connection reset by peer")}
    assert verdict(answers, {1: "last seen in step 5 (data)"}) == (
        "rank 1 does not answer, last seen in step 5 (data)"
    )


@pytest.mark.parametrize(("retired", "expected"), [(True, None), (False, "gloo:all_gather of ep")])
def test_the_collective_is_the_newest_that_has_not_ended(retired: bool, expected: str | None):
    done = {"retired": True, "state": "scheduled", "profiling_name": "gloo:all_reduce"}
    last = {"retired": retired, "state": "scheduled", "profiling_name": "gloo:all_gather"}
    entries = [done | {"process_group": ["0", "default_pg"]}, last | {"process_group": ["1", "ep"]}]
    assert pending_collective({"entries": entries}) == expected
    assert pending_collective({}) is None


def test_what_is_rare_may_take_longer():
    progress = StepProgress()
    assert progress.is_rare
    progress.enter(7, "data")
    for step, phase, expected in (
        (7, "forward_backward", True),  # the first one
        (8, "forward_backward", False),
        (8, "save", True),
        (9, "data", False),
    ):
        progress.enter(step, phase)
        assert progress.is_rare == expected, (step, phase)


def test_alone_nothing_is_watched():
    with Watchdog(Ranks(), ParallelConfig(), None, StepProgress()) as watchdog:
        assert watchdog._thread is None
