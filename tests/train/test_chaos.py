"""The small version of `tools/chaos.py`: some rounds, each another kind of disturbance."""

import argparse
import re
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
ROUNDS = 5


@pytest.mark.slow
@pytest.mark.distributed
def test_five_disturbances_on_two_ranks_lose_no_bit_and_leave_a_true_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(TOOLS)
    import chaos  # in this process, whose server of ranks has imported everything

    options = argparse.Namespace(rounds=ROUNDS, steps=24, seed=1)
    with chaos.disk_at(tmp_path) as disk:
        code = chaos.chaos(options, disk)
    said = capsys.readouterr().out
    assert code == 0, said
    assert f"{ROUNDS} rounds; every tensor and logged number is equal" in said
    kinds = re.findall(r"^ +\d+  (\w+) +after step", said, re.M)
    assert len(set(kinds)) == ROUNDS
