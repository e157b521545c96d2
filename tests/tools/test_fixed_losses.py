"""The comparison of losses sees a changed digit, and nothing else."""

from pathlib import Path
from types import ModuleType

import pytest

BEFORE = {
    "smoke fp32": [
        {"kind": "train", "step": 1, "loss/main": 8.25, "grad_norm/total": 1.5},
        {"kind": "train", "step": 2, "loss/main": 8.0, "grad_norm/total": 1.25},
    ]
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "tools")
        import fixed_losses

        return fixed_losses


def test_equal_losses_have_no_difference(tool: ModuleType):
    assert tool.differences(BEFORE, {"smoke fp32": [*BEFORE["smoke fp32"]]}) == []


def test_the_last_bit_of_one_value_is_a_difference(tool: ModuleType):
    first, second = BEFORE["smoke fp32"]
    after = {"smoke fp32": [first, second | {"loss/main": 8.000000000000002}]}
    assert tool.differences(BEFORE, after) == [
        "smoke fp32: train loss/main of step 2 was 8.0, is 8.000000000000002"
    ]


def test_missing_lines_and_runs_are_differences(tool: ModuleType):
    after = {"smoke fp32": BEFORE["smoke fp32"][:1], "tiny fp32": BEFORE["smoke fp32"]}
    assert tool.differences(BEFORE, after) == [
        "smoke fp32: 2 lines before, 1 after",
        "tiny fp32: not in the file",
    ]
