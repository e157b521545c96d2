"""The small version of `tools/kill_test.py`: every moment inside a save is covered by the tool."""

import argparse
from pathlib import Path

import pytest

from tests.support.cases import further
from tests.support.embedded import fill_cache
from tests.support.forked import server

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(2, 16), further((4, 40))])
def test_kills_inside_a_save_lose_no_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kills: int,
    steps: int,
):
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.setenv("PYTHONPATH", "")  # the tool sets it; what it was returns at the end
    server()
    import kill_test  # in this process, whose server of runs has imported everything

    fill_cache(tmp_path / "cache")
    # with this seed no kill depends on the clock: each waits for a file of a save
    options = argparse.Namespace(kills=kills, steps=steps, stage="pretrain", seed=11)
    code = kill_test.kill_test(options, tmp_path)
    said = capsys.readouterr().out
    assert code == 0, said
    assert f"{kills} kills; every tensor and logged number is equal" in said
    moments = [line.split()[1] for line in said.splitlines() if line[:4].strip().isdigit()]
    assert len(moments) == kills
    assert "anytime" not in moments
