"""The small version of `tools/chaos.py`: some rounds, each another kind of disturbance."""

import argparse
import re
from pathlib import Path

import pytest

from tests.support.cases import further

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.waits(15)
@pytest.mark.timeout(600)  # each round has a limit of its own, which grows with the load
@pytest.mark.parametrize("rounds", [further(5)])
def test_disturbances_on_two_ranks_lose_no_bit_and_leave_a_true_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rounds: int,
):
    monkeypatch.syspath_prepend(TOOLS)
    import chaos  # in this process, whose server of ranks has imported everything

    options = argparse.Namespace(rounds=rounds, steps=24, seed=1)
    with chaos.disk_at(tmp_path) as disk:
        code = chaos.chaos(options, disk)
    said = capsys.readouterr().out
    assert code == 0, said
    assert f"{rounds} rounds; every tensor and logged number is equal" in said
    kinds = re.findall(r"^ +\d+  (\w+) +after step", said, re.M)
    assert len(set(kinds)) == rounds
