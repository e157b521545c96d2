import importlib

import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.ops.routing import copy_or_add, embedding_bag

pytest.importorskip("triton")
kernels = importlib.import_module("nemotron.ops.routing.copies_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(copies_of: list[int], filling: int = 0) -> list[Tensor]:
    """Return `token`, `place` and `starts` for tokens with so many copies, in rows shuffled."""
    g = torch.Generator().manual_seed(len(copies_of))
    counts = torch.tensor(copies_of)
    rows = torch.randperm(int(counts.sum()) + filling, generator=g)
    place = rows[: int(counts.sum())]
    token = torch.zeros(rows.shape[0], dtype=torch.int64)
    token[place] = torch.arange(len(copies_of)).repeat_interleave(counts)
    return [t.to(DEVICE) for t in (token, place, counts.cumsum(0) - counts)]


def values(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(width)
    return torch.randn(num_rows, width, generator=g).to(DEVICE, dtype)


CASES = [[1], [0, 3, 0], [2] * 7, [6, 0, 9, 1, 17, 8, 0]]


@pytest.mark.parametrize("width", [5, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies_of", CASES, ids=str)
def test_copies_and_sums_are_those_of_the_reference(
    copies_of: list[int], dtype: torch.dtype, width: int
):
    lists = draw(copies_of)
    for direction, num_rows in (("copy", len(copies_of)), ("add", lists[0].shape[0])):
        x = values(num_rows, width, dtype)
        exact = results(copy_or_add, [*doubled([x]), *lists], direction)
        # sums of at most 17 rows in float32, rounded once; the interpreter cuts bfloat16 off
        limit = 1e-6 if dtype == torch.float32 else 2**-7
        for function in (kernels.token_copies, embedding_bag):
            assert worst(results(function, [x, *lists], direction), exact) <= limit


def test_copies_are_exact():
    lists = draw(CASES[-1])
    x = values(7, 48, torch.bfloat16)
    assert torch.equal(kernels.token_copies(x, *lists, "copy"), x[lists[0]])


def test_rows_are_added_in_the_order_of_place():
    # 1 disappears beside 2 ** 24, so only one order gives this sum
    rows = torch.tensor([[1.0], [1.0], [2.0**24], [-(2.0**24)]], device=DEVICE)
    token, starts = (torch.zeros(size, dtype=torch.int64, device=DEVICE) for size in (4, 1))
    for order, expected in (([2, 0, 1, 3], 0), ([0, 2, 1, 3], 0), ([0, 1, 2, 3], 2)):
        place = torch.tensor(order, device=DEVICE)
        assert kernels.token_copies(rows, token, place, starts, "add").item() == expected


def test_rows_that_only_fill_up_are_not_added():
    token, place, starts = draw([2, 1, 3], filling=4)
    rows = values(10, 48, torch.float32)
    exact = results(copy_or_add, [*doubled([rows]), token, place, starts], "add")
    filled = torch.ones(10, dtype=torch.bool, device=DEVICE).index_fill(0, place, False)
    poisoned = rows.masked_fill(filled[:, None], float("nan"))
    found = kernels.token_copies(poisoned, token, place, starts, "add")
    assert worst([found], exact[:1]) <= 1e-6


def test_a_slice_of_wider_rows_is_read_in_place():
    token, place, starts = draw([2, 1, 3])
    wide = values(6, 64, torch.float32)
    for direction in ("copy", "add"):
        x = wide[: 3 if direction == "copy" else 6]
        usual = kernels.token_copies(x[:, 16:48].contiguous(), token, place, starts, direction)
        assert torch.equal(
            kernels.token_copies(x[:, 16:48], token, place, starts, direction), usual
        )
        # as expand() leaves a gradient
        other = x[:, :1].expand(-1, 32)
        usual = kernels.token_copies(other.contiguous(), token, place, starts, direction)
        assert torch.equal(kernels.token_copies(other, token, place, starts, direction), usual)


def test_no_copies_at_all_give_zeros():
    lists = draw([0, 0, 0])
    added, gradient = results(kernels.token_copies, [values(0, 48, torch.float32), *lists], "add")
    assert added.shape == (3, 48)
    assert not added.any()
    assert gradient.shape == (0, 48)
    copied, gradient = results(kernels.token_copies, [values(3, 48, torch.float32), *lists], "copy")
    assert copied.shape == (0, 48)
    assert not gradient.any()


def test_a_wide_row_takes_several_programs():
    lists = draw([3, 9])
    narrow = {"columns": 32, "warps": 4, "rows": 4}
    for direction, num_rows in (("copy", 2), ("add", 12)):
        x = values(num_rows, 83, torch.float32)
        exact = results(copy_or_add, [*doubled([x]), *lists], direction)
        with kernels.COPY.forced(narrow), kernels.ADD.forced(narrow):
            found = results(kernels.token_copies, [x, *lists], direction)
        assert worst(found, exact) <= 1e-6


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device(no_waits):
    lists = draw([3, 0, 2])
    x = values(3, 48, torch.bfloat16).requires_grad_()

    def step() -> None:
        rows = kernels.token_copies(x, *lists, "copy")
        kernels.token_copies(rows, *lists, "add").sum().backward()

    step()  # compiles
    with no_waits():
        step()
