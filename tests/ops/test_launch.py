"""The launcher finds what was compiled for arguments like these, and nothing else."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from nemotron.ops import launch
from nemotron.ops.launch import Launcher

GRID = (3, 1, 1)
X = torch.empty(64, 64)


class Kernel:
    """Stands for Triton: counts what it is asked for, and what is launched without it."""

    def __init__(self, function: object = 1) -> None:
        self.searched, self.launched = 0, []
        self.compiled = SimpleNamespace(function=function)

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*arguments, num_warps):
            self.searched += 1
            return Compiled(self, self.compiled.function)

        return run


class Compiled:
    def __init__(self, kernel: Kernel, function: object) -> None:
        self.kernel, self.function = kernel, function

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


def searches(*calls, warps: tuple[int, ...] = (4, 4)) -> int:
    """Return how many of the launches had to be searched."""
    kernel = Kernel()
    launcher = Launcher(kernel)
    for (tensors, numbers, constants), num_warps in zip(calls, warps, strict=True):
        launcher(GRID, tensors, numbers, constants, num_warps=num_warps)
    assert kernel.searched + len(kernel.launched) == len(calls)
    return kernel.searched


def test_the_second_launch_is_not_searched():
    kernel = Kernel()
    launcher = Launcher(kernel)
    for grid in (GRID, (5, 1, 1)):
        launcher(grid, (X, X), (7, 16), (True, 8), num_warps=4)
    assert kernel.searched == 1
    ((grid, arguments),) = kernel.launched
    assert grid == (5, 1, 1)
    assert all(a is b for a, b in zip(arguments[:2], (X, X), strict=True))
    assert arguments[2:] == (7, 16, True, 8)


@pytest.mark.parametrize(
    ("one", "other", "is_alike"),
    [
        (7, 9, True),
        (16, 48, True),
        (16, 24, False),
        (1, 3, False),
        (0, 16, True),
        (-16, -15, False),
        (2**31 - 16, 2**31, False),
        (2**31 - 1, 2**31 + 1, False),
    ],
)
def test_numbers_are_alike_as_triton_specialises_them(one: int, other: int, is_alike: bool):
    found = searches(((X,), (one, 5), ()), ((X,), (other, 5), ()))
    assert found == (1 if is_alike else 2)


def flat(start: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(32, dtype=dtype)[start:]


@pytest.mark.parametrize(
    ("one", "other", "is_alike"),
    [
        ((flat(0), flat(0)), (flat(4), flat(8)), True),
        ((flat(0), flat(0)), (flat(0), flat(1)), False),
        ((flat(1), flat(0)), (flat(0), flat(1)), False),
        ((flat(0), flat(0)), (flat(0), flat(0, torch.int32)), False),
        ((flat(0), flat(0)), (flat(0).to("meta"), flat(0).to("meta")), False),
    ],
)
def test_tensors_are_alike_by_dtype_alignment_and_device(one, other, is_alike: bool):
    assert searches((one, (), ()), (other, (), ())) == (1 if is_alike else 2)


def test_descriptors_are_alike_by_dtype_and_tile():
    def described(block: int) -> tuple[object, ...]:
        return TensorDescriptor.from_tensor(torch.empty(64, 64), [16, block]), X

    assert searches((described(16), (), ()), (described(16), (), ())) == 1
    assert searches((described(16), (), ()), (described(32), (), ())) == 2


def test_constants_and_options_are_taken_as_they_are():
    assert searches(((X,), (), (8,)), ((X,), (), (9,))) == 2
    assert searches(((X,), (), (8,)), ((X,), (), (8,)), warps=(4, 8)) == 2


def test_sizes_that_always_differ_are_not_all_remembered(monkeypatch):
    monkeypatch.setattr(launch, "MOST_KEYS", 10)
    kernel = Kernel()
    launcher = Launcher(kernel)
    for size in range(16, 16 * 100, 16):
        launcher(GRID, (X,), (size,), (), num_warps=4)
    assert kernel.searched == 1
    assert len(launcher._compiled) == 10


def test_what_was_only_compiled_or_interpreted_is_not_launched():
    kernel = Kernel(function=None)
    launcher = Launcher(kernel)
    for _ in range(3):
        launcher(GRID, (X,), (), (), num_warps=4)
    assert kernel.searched == 3
    assert not kernel.launched


@pytest.mark.parametrize("size", range(1, 70))
def test_a_power_of_two_is_the_next_one(size: int):
    found = launch.power_of_2(size)
    assert found >= size > found // 2
    assert found & (found - 1) == 0
