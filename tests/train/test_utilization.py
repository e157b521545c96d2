"""The utilization that a run reports: never above 1, whatever else the machine did."""

from pathlib import Path

import pytest

from nemotron.run.metrics import read_metrics
from nemotron.train import loop, start
from nemotron.train.start import train


@pytest.mark.parametrize(("again", "known"), [(1e14, True), (1.0, False)])
def test_a_peak_that_was_measured_too_low_is_found_out(
    recipe, monkeypatch, capsys, again: float, known: bool
):
    monkeypatch.setattr(start, "matmul_peak", lambda *_: 1e3)
    monkeypatch.setattr(loop, "measure_matmul_peak", lambda *_: again)
    config = recipe("busy")
    assert train(config, stop_at=4) == 75
    records = read_metrics(Path(config.output) / "busy" / "metrics.jsonl")
    shares = [record["perf/mfu"] for record in records if record["kind"] == "train"]
    assert shares[0] is None
    assert all((0 < share < 1) if known else share is None for share in shares[1:])
    said = capsys.readouterr().out
    assert said.count("when other programs slowed them down") == 1
    assert ("they reach 100,000 GFLOP/s now" if known else "no MFU is shown") in said
    assert "mfu     ?" in said
    assert "mfu   nan%" not in said
