"""Mirrors receive what metrics.jsonl has, and none of them can stop a run."""

import importlib.util
import json
from pathlib import Path

import pytest

from nemotron.errors import UserError
from nemotron.run.metrics import read_metrics
from nemotron.run.trackers import Mirrors, TrackedRun, check_trackers
from nemotron.train.start import train


class Fragile:
    """A tracker that works until a given call."""

    def __init__(self, breaks_at: str) -> None:
        self.breaks_at, self.seen = breaks_at, []

    def _call(self, name: str) -> None:
        if name == self.breaks_at:
            raise ConnectionError("service is down")

    def start(self, run: TrackedRun) -> str:
        self._call("start")
        return "somewhere"

    def log(self, step: int, values: dict[str, float]) -> None:
        self._call(f"log {step}")
        self.seen.append((step, values))

    def finish(self) -> None:
        self._call("finish")


RUN = TrackedRun("project", "name", "id", Path("folder"), 0, {})


@pytest.mark.parametrize(
    ("breaks_at", "seen"), [("start", []), ("log 2", [1]), ("finish", [1, 2, 3]), ("", [1, 2, 3])]
)
def test_a_failing_mirror_is_named_once_and_left_out(breaks_at, seen):
    told, fragile, sound = [], Fragile(breaks_at), Fragile("")
    mirrors = Mirrors({"fragile": fragile, "sound": sound}, told.append)
    mirrors.start(RUN)
    for step in (1, 2, 3):
        mirrors.log({"kind": "train", "step": step, "loss/main": 0.5, "event": "x", "bad": None})
    mirrors.finish()
    assert [step for step, _ in fragile.seen] == seen
    assert [step for step, _ in sound.seen] == [1, 2, 3]
    assert sound.seen[0][1] == {"loss/main": 0.5}
    failures = [line for line in told if "fragile failed" in line]
    assert len(failures) == bool(breaks_at)
    assert all("service is down" in line for line in failures)


def test_a_missing_package_is_answered_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackio.*pip install 'nemotron-train\[track\]'"):
        check_trackers(["trackio"])


def tracked(recipe, tracker: str, monkeypatch) -> Path:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    schedule = {"kind": "constant", "peak": 1e-3, "total_steps": 2}
    config = recipe(tracker, schedule=schedule, logging={"trackers": [tracker]})
    assert train(config, stop_at=1) == 75
    assert train(config, resume=True) == 0
    return Path(config.output) / tracker


@pytest.mark.filterwarnings("ignore")  # of the tracker's own dependencies
def test_tensorboard_has_every_number_once_also_after_a_resume(recipe, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tracked(recipe, "tensorboard", monkeypatch)
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("loss/main")}
    truth = {
        r["step"]: r["loss/main"]
        for r in read_metrics(run / "metrics.jsonl")
        if r["kind"] == "train"
    }
    assert logged == pytest.approx(truth)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the tracker's own dependencies
def test_wandb_without_a_key_writes_into_the_run_and_sends_nothing(recipe, monkeypatch, capsys):
    pytest.importorskip("wandb")
    run = tracked(recipe, "wandb", monkeypatch)
    assert "wandb: offline in" in capsys.readouterr().out
    stores = list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(stores) == 2
    run_id = json.loads((run / "provenance.json").read_text())["id"]
    assert all(run_id in store.name for store in stores)


@pytest.mark.filterwarnings("ignore")  # of the tracker's own dependencies
def test_trackio_goes_on_with_the_same_run(recipe, monkeypatch, tmp_path):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = tracked(recipe, "trackio", monkeypatch)
    log = (run / "log.txt").read_text()
    assert "trackio failed" not in log
    assert "trackio show --project nemotron" in log
