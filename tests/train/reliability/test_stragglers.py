"""Who is slow, and in what: from a table of seconds, over several intervals."""

import torch

from nemotron.parallel.runtime import Ranks
from nemotron.train.config import ReliabilityConfig
from nemotron.train.reliability.stragglers import PROBE, Stragglers, slowest


def test_the_rank_with_the_longest_own_time_is_slowest_in_what_exceeds_the_median():
    #        data  forward  optimizer  probe
    table = [[0.1, 2.0, 0.1, 0.01], [0.9, 2.1, 0.1, 0.01], [0.1, 2.0, 0.1, 0.01]]
    rank, part, factor, seconds = slowest(table)
    assert (rank, part, seconds) == (1, "data", 0.9)
    assert abs(factor - 3.1 / 2.2) < 1e-12


def test_a_slow_device_shows_in_the_probe_alone():
    table = [[0.1, 2.0, 0.1, 0.01], [0.1, 2.0, 0.1, 0.01], [0.1, 2.0, 0.1, 0.03]]
    rank, part, factor, seconds = slowest(table)
    assert (rank, part, seconds) == (2, PROBE, 0.03)
    assert abs(factor - 3.0) < 1e-12


def test_only_the_same_rank_often_enough_in_a_row_is_told():
    config = ReliabilityConfig(straggler_factor=1.5, straggler_after=3)
    subject = Stragglers(config, Ranks(0, 4, grouped=False), torch.device("cpu"))
    seen = [(1, 1.6), (1, 1.6), (2, 1.6), (2, 1.6), (2, 1.4), (2, 1.6), (2, 1.6), (2, 1.6), (2, 9)]
    told = [subject._judge(rank, factor, "") is not None for rank, factor in seen]
    assert told == [False] * 7 + [True, False]
