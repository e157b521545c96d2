"""A recipe that stops its run: all ranks after the same step, saved, said, and resumed."""

import json
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.run.folder import dump_recipe
from nemotron.train.start import train
from tests.support import forked
from tests.support.job import Job
from tests.support.same_run import assert_same_run

SLOW = ({"kind": "sleep", "step": 1, "last_step": 16, "seconds": 0.2},)
"""Every step takes so long that the clock ends the run in between."""


@pytest.mark.slow
def test_a_run_that_stops_every_three_steps_ends_with_the_same_bits(
    recipe, undisturbed, capsys, monkeypatch
):
    config = recipe("pieces", stop={"every_steps": 3})
    assert train(config) == 75
    assert "stopped by stop.every_steps = 3 after step 3 of 8, saved" in capsys.readouterr().out
    status = json.loads((config.run_path / "status.json").read_text())
    reason = "stop.every_steps = 3"
    assert status == {"state": "stopped", "step": 3, "exit_code": 75, "reason": reason}
    monkeypatch.chdir(config.run_path.parent)
    assert run(["runs", "."]) == 0
    assert "stopped by stop.every_steps = 3  3 of 8" in capsys.readouterr().out
    assert run(["report", "pieces"]) == 0
    page = (config.run_path / "report.html").read_text()
    assert '<span class="state stopped">stopped</span> by stop.every_steps = 3, step 3 of 8' in page
    (config.run_path / "report.html").unlink()
    assert train(config, resume=True) == 75
    assert "after step 6 of 8" in capsys.readouterr().out
    assert train(config, resume=True) == 0  # the schedule ends before step 9
    assert "reason" not in json.loads((config.run_path / "status.json").read_text())
    assert_same_run(config.run_path, undisturbed)


def test_a_stop_that_falls_on_the_last_step_is_the_end(recipe, capsys):
    schedule = {"kind": "constant", "peak": 1e-3, "total_steps": 2}
    assert train(recipe("even", schedule=schedule, stop={"every_steps": 2})) == 0
    assert "stopped" not in capsys.readouterr().out


def test_the_command_stops_by_the_clock_with_75_and_goes_on(on_two, tmp_path: Path):
    config = on_two("timed", stop={"after_minutes": 1e-6})
    path = tmp_path / "timed.yaml"
    path.write_text(dump_recipe(config))
    first = forked.command("train", path, output=tmp_path / "first.txt")
    assert first.wait() == 75, first.text
    assert "stopped by stop.after_minutes = 1e-06 after step 1 of 8, saved" in first.text
    assert "timed --resume" in first.text
    words = ("train", config.run_path, "--resume", "--stop-at", "3", "stop.after_minutes=9")
    again = forked.command(*words, output=tmp_path / "again.txt")
    assert again.wait() == 75, again.text
    assert "stopped by --stop-at 3 after step 3 of 8" in again.text


@pytest.mark.distributed
@pytest.mark.waits(10)
def test_the_clock_stops_two_ranks_at_the_same_step_and_the_losses_stay(on_two):
    whole = Job(on_two("whole", steps=16))
    assert whole.wait() == [0, 0], whole.text()
    job = Job(on_two("timed", steps=16, faults=SLOW, stop={"after_minutes": 0.025}))
    assert job.wait() == [75, 75], job.text()
    status = json.loads((job.run / "status.json").read_text())
    done = status["step"]
    assert 1 <= done < 16
    assert status["reason"].startswith("stop.after_minutes = 0.025")
    said = f"stopped by stop.after_minutes = 0.025 after step {done} of 16, saved"
    texts = (job.text(), (job.run / "ranks" / "rank-1.log").read_text())
    assert "go on: start the 2 ranks again, each with: " in texts[0]
    assert all(said in text.replace(" on rank 1", "").replace(" on rank 0", "") for text in texts)
    again = Job(on_two("timed", steps=16), "--resume")
    assert again.wait() == [0, 0], again.text()
    assert_same_run(job.run, whole.run)
