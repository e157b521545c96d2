"""Bounds, scores and counted bytes, against numbers worked out by hand."""

import pytest
import torch

from nemotron.ops.apply import ALL, GENERATION
from nemotron.sol.bound import Pass, Roofs, bound, compulsory, score
from nemotron.sol.problems import Problem, Source, problems
from nemotron.sol.sizes import SIZES
from nemotron.sol.traffic import counted


def test_a_pass_takes_the_longer_of_computing_and_moving():
    # 2 s of FLOPs beside 1 s of bytes, then 1 s beside 3 s
    found = bound([Pass(20.0, 100), Pass(10.0, 300)], Roofs(10.0, 100.0))
    assert found.seconds == 5.0
    assert found.binds == "memory"


def test_the_score_is_one_at_the_bound_and_a_half_at_the_reference():
    assert score(1.0, reference=9.0, least=1.0) == 1.0
    assert score(9.0, reference=9.0, least=1.0) == 0.5
    assert score(17.0, reference=9.0, least=1.0) == pytest.approx(1 / 3)


def test_every_input_output_and_gradient_is_moved_once():
    problem = Problem("linear", "", lambda s: ([], ()), flops=7.0)
    x, ids, y = torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64), torch.zeros(5, 2)
    forward, backward = compulsory(problem, [x, ids], [y])
    assert (forward.flops, backward.flops) == (7.0, 14.0)
    assert forward.bytes == 60 + 40 + 40
    # x, ids and the output's gradient are read, the gradient of x is written
    assert backward.bytes == 60 + 40 + 40 + 60
    # handed on, x is not written, but has a gradient to read
    forward, backward = compulsory(problem, [x, ids], [x, y])
    assert forward.bytes == 60 + 40 + 40
    assert backward.bytes == 60 + 40 + 60 + 40 + 60


def test_traffic_counts_what_is_computed_and_no_view():
    x = torch.zeros(4, 6)
    with counted() as traffic:
        x.t().reshape(3, 8)[1:]  # a copy: 24 elements read, 24 written
    assert traffic.bytes == 2 * 96
    with counted() as traffic:
        torch.zeros(1, 6).expand(4, 6) + x  # 6 written; then 6 and 24 read, 24 written
    assert traffic.bytes == 24 + 24 + 96 + 96
    with counted() as traffic:
        x.mul_(2)  # read and written in place
    assert traffic.bytes == 2 * 96


def test_traffic_sees_backward():
    x = torch.zeros(8, requires_grad=True)
    with counted() as forward:
        y = x * 2
    with counted() as both:
        (x * 2).backward(torch.ones(8))
    assert y.shape == (8,)
    assert both.bytes > forward.bytes


@pytest.mark.parametrize("name", ["tiny", "nano-proxy"])
def test_every_operation_that_trains_has_a_problem(name: str):
    size = SIZES[name]
    trains = {op.name for op in ALL} - GENERATION
    assert trains == {problem.operation for problem in problems(size, size.usual)}


def test_activations_are_drawn_in_the_dtype_that_is_asked_for():
    size = SIZES["tiny"]
    for dtype in (torch.float32, torch.bfloat16):
        source = Source(torch.Generator().manual_seed(0), dtype)
        for problem in problems(size, size.checked):
            (first, *_), _ = problem.draw(source)
            assert first.dtype == (torch.float32 if problem.is_wide else dtype), problem.name
