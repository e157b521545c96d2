"""Statistics of several answers, against enumeration of all draws and published values."""

import itertools
import statistics

import numpy as np
import pytest

from nemotron.posttrain.environments.base import Response, Verdict, build_row
from nemotron.posttrain.suites.results import summarize
from nemotron.posttrain.suites.samples import Sample
from nemotron.posttrain.suites.statistics import Estimate, majority, pass_at, sizes


@pytest.mark.parametrize("answers", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_answer(answers: int):
    for right in range(answers + 1):
        given = [True] * right + [False] * (answers - right)
        for k in range(1, answers + 1):
            draws = [any(draw) for draw in itertools.combinations(given, k)]
            assert pass_at(k, answers, right) == pytest.approx(np.mean(draws), abs=1e-15)


def test_pass_at_k_is_the_published_product():
    """The stable form that Chen et al. 2021 give in figure 3."""
    for n, c, k in ((200, 13, 1), (200, 13, 100), (200, 150, 10), (200, 1, 199)):
        published = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
        assert pass_at(k, n, c) == pytest.approx(published, rel=1e-12)


def test_pass_at_k_is_unbiased():
    """The mean over all outcomes of n answers, each right with p, is 1 - (1 - p)^k."""
    p, n = 0.3, 6
    for k in (1, 2, 5):
        mean = sum(
            p ** sum(outcome) * (1 - p) ** (n - sum(outcome)) * pass_at(k, n, sum(outcome))
            for outcome in itertools.product((0, 1), repeat=n)
        )
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_majority_is_the_mean_over_all_ways_to_break_ties():
    worth = {"a": 1.0, "b": 0.0, "c": 0.25}
    for votes in itertools.product(["a", "b", "c", None], repeat=4):
        given = [vote for vote in votes if vote is not None]
        # the standard library's, which lists all most frequent ones
        firsts = statistics.multimode(given)
        wanted = np.mean([worth[vote] for vote in firsts]) if firsts else 0.0
        rewards = [worth.get(vote, 0.0) for vote in votes]
        assert majority(votes, rewards) == pytest.approx(wanted), votes


def test_an_error_is_that_of_a_mean_over_tasks():
    values = [0.0, 1.0, 0.5, 1.0, 0.25]
    found = Estimate.of(values)
    assert found.mean == statistics.mean(values)
    assert found.error == pytest.approx(statistics.stdev(values) / 5**0.5)
    assert Estimate.of([0.5]) == Estimate(0.5, None)
    assert Estimate.of([]) == Estimate(None, None)


def test_sizes_are_powers_of_two_and_all():
    assert [sizes(n) for n in (1, 2, 3, 8, 12)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 12],
    ]


def sample(number: int, k: int, verdict: Verdict, task: str = "t@0") -> Sample:
    return Sample(task, number, k, build_row("t", "?"), Response(""), verdict, 3, k == 1)


def test_faults_are_counted_and_never_scored():
    fault = Verdict(0.0, error="the verifier ended")
    right, wrong = Verdict(1.0, extracted="4"), Verdict(0.0, extracted="5")
    rows = [[right, wrong], [right, fault], [fault, fault], [right, right]]
    samples = [sample(n, k, verdict) for n, row in enumerate(rows) for k, verdict in enumerate(row)]
    [found] = summarize(samples)
    assert (found.tasks, found.samples, found.verifier_faults) == (3, 2, 3)
    assert found.reward == pytest.approx(np.mean([0.5, 1.0, 1.0]))
    # rows with a fault have too few answers for these
    assert found.pass_at[1].mean == pytest.approx(np.mean([0.5, 1.0]))
    assert found.pass_at[2].mean == 1.0
    assert found.majority is not None
    assert found.majority.mean == pytest.approx(np.mean([0.5, 1.0]))
    assert found.truncated == 0.5


def test_nothing_judged_has_no_mean():
    [found] = summarize([sample(0, 0, Verdict(0.0, error="late"))])
    assert (found.tasks, found.reward, found.error, found.verifier_faults) == (0, None, None, 1)
    assert "none judged" in str(found)
