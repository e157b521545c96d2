"""Reading ahead changes when rows are read, never which."""

import threading
import time

import pytest
import torch

from nemotron.data.batch import Batch
from nemotron.data.prefetch import Prefetcher
from nemotron.errors import UserError


class Reader:
    """Notes which steps were read, by which thread; some cannot be read."""

    def __init__(self, broken: int | None = None) -> None:
        self.read: list[int] = []
        self.threads: set[int] = set()
        self._broken = broken

    def __call__(self, step: int) -> Batch:
        if step == self._broken:
            raise UserError(f"step {step} is broken")
        self.read.append(step)
        self.threads.add(threading.get_ident())
        ids = torch.full((1, 3), step)
        return Batch(ids, ids, None)


def steps_of(subject: Prefetcher, steps: list[int]) -> list[int]:
    return [int(subject.take(step).input_ids[0, 0]) for step in steps]


@pytest.mark.parametrize("depth", [1, 3])
def test_each_step_is_read_once_and_none_after_the_last(depth: int):
    reader = Reader()
    subject = Prefetcher(reader, depth=depth, num_steps=9)
    assert steps_of(subject, list(range(9))) == list(range(9))
    assert reader.read == list(range(9))
    assert threading.get_ident() not in reader.threads


def test_any_step_may_be_asked_for_next():
    subject = Prefetcher(Reader(), depth=2, num_steps=20)
    order = [0, 1, 7, 8, 2, 3, 3, 19]
    assert steps_of(subject, order) == order


def test_rows_are_there_when_they_are_asked_for():
    reader = Reader()
    subject = Prefetcher(reader, depth=2, num_steps=20)
    subject.take(4)
    deadline = time.monotonic() + 30
    while reader.read != [4, 5, 6] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert reader.read == [4, 5, 6]


def test_a_mistake_is_told_at_its_own_step():
    subject = Prefetcher(Reader(broken=2), depth=3, num_steps=9)
    assert steps_of(subject, [0, 1]) == [0, 1]
    with pytest.raises(UserError, match="step 2 is broken"):
        subject.take(2)
