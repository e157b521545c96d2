"""report, runs and compare: where they write, what they print, what they refuse."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.run.lock import FolderLock
from nemotron.run.metrics import read_metrics

Copy = Callable[..., Path]


def listing(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder, with the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report", "absent"], "absent: does not exist; give the folder of a run"),
        (["report", "empty"], "empty: is not the folder of a run; give one that"),
        (["report", "runs/mine", "runs/mine"], "mine: is named twice; give each run once."),
        (
            ["report", "runs/mine", "--out", "no/x.html"],
            "--out = no/x.html lies in no, which is not a folder;",
        ),
        (
            ["report", "runs/mine", "--out", "empty"],
            "--out = empty is a folder, a link or a",
        ),
        (
            ["report", "runs/mine", "--out", "notes"],
            "--out = notes is not a report, so it is",
        ),
        (
            ["report", "runs/mine", "--every", "0"],
            "'--every': Input should be greater than",
        ),
        (["report", "runs/mine", "--prompt", ""], "prompt 1"),
        (["compare", "runs/mine"], "Missing argument"),
        (["compare", "runs/mine", "absent"], "absent: does not exist"),
        (["runs", "absent"], "absent: is not a folder; give the one that holds your runs."),
        (["runs", "notes"], "notes: is not a folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    words: list[str],
    sentence: str,
    copy: Copy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    copy()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    assert run(words) == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert answer.err.count("\n") == 1
    assert sentence in answer.err
    assert listing(tmp_path) == before


def test_a_report_replaces_the_one_before_and_nothing_else_of_the_run(copy: Copy):
    folder = copy()
    before = listing(folder)
    for _ in range(2):
        assert run(["report", str(folder / "checkpoints")]) == 0
    after = listing(folder)
    assert after.pop("report.html")
    assert after == before


def test_watching_ends_with_the_run(copy: Copy, monkeypatch: pytest.MonkeyPatch):
    folder = copy()
    page = folder / "report.html"
    lock = FolderLock(folder)
    lock.acquire()
    (folder / "status.json").write_text('{"state": "running", "step": 3, "exit_code": null}')
    seen = []

    def wait(seconds: float) -> None:
        seen.append((seconds, page.read_text()))
        if len(seen) == 2:
            (folder / "status.json").write_text('{"state": "done", "step": 9, "exit_code": 0}')
            lock.release()

    monkeypatch.setattr(time, "sleep", wait)
    assert run(["report", str(folder), "--watch", "--every", "2.5"]) == 0
    assert [seconds for seconds, _ in seen] == [2.5, 2.5]
    assert all('http-equiv="refresh" content="3"' in text for _, text in seen)
    assert ">running</span>" in seen[0][1]
    assert "refresh" not in page.read_text()
    assert ">done</span>" in page.read_text()


def test_a_page_that_is_no_longer_watched_is_not_read_again(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
):
    folder = copy()
    lock = FolderLock(folder)
    lock.acquire()

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert run(["report", str(folder), "--watch"]) == 130
    lock.release()
    assert "refresh" not in (folder / "report.html").read_text()


def test_runs_are_listed_with_state_step_and_best_validation(
    copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for age, name in enumerate(["done", "deep/running", "killed", "fresh"]):
        folder = copy(name)
        os.utime(folder / "metrics.jsonl", (1e9 - age * 86400,) * 2)
        if name != "done":
            (folder / "status.json").write_text('{"state": "running", "step": 5, "exit_code": 0}')
    (folder / "metrics.jsonl").unlink()
    os.utime(folder / "status.json", (5e8,) * 2)
    lock = FolderLock(tmp_path / "runs/deep/running")
    lock.acquire()
    (tmp_path / "runs/.cache").mkdir()
    (tmp_path / "runs/other").mkdir()
    assert run(["runs", str(tmp_path / "runs")]) == 0
    lock.release()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:5] for row in rows[1:]] == [
        ["done", "done", "9", "of", "9"],
        ["deep/running", "running", "9", "of", "9"],
        ["killed", "killed", "9", "of", "9"],
        ["fresh", "killed", "5", "of", "9"],
    ]
    values = [
        (float(r["validation/loss"] or 0), r["step"])
        for r in read_metrics(tmp_path / "runs/done/metrics.jsonl")
        if r["kind"] == "validation"
    ]
    best, step = min(values)
    assert rows[1][6:11] == ["loss", f"{best:.4f}", "at", "step", str(step)]
    assert rows[4][5:7] == ["-", "-"]


def test_a_run_or_something_in_it_is_listed_by_itself(
    copy: Copy, capsys: pytest.CaptureFixture[str]
):
    path = copy("mine")
    copy("other")
    for given in (path, path / "checkpoints", next((path / "checkpoints").iterdir())):
        assert run(["runs", str(given)]) == 0
        [_, row] = capsys.readouterr().out.splitlines()
        assert row.split()[:5] == [str(path), "done", "9", "of", "9"]


def test_a_folder_without_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


def test_a_comparison_has_results_and_settings(copy: Copy, capsys: pytest.CaptureFixture[str]):
    first, second = copy("first"), copy("second")
    path = second / "metrics.jsonl"
    records = [r for r in read_metrics(path) if int(r["step"] or 0) <= 6]
    for record in records:
        for key in ("loss/main", "perf/tokens_per_s"):
            if record.get(key) is not None:
                record[key] = 2 * float(record[key] or 0)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = second / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 1234", "seed: 7"))
    assert run(["compare", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    rows = {line[:22].strip(): line.split() for line in out.splitlines()}
    train = [r for r in read_metrics(first / "metrics.jsonl") if r["kind"] == "train"]
    losses = [float(r["loss/main"]) for r in train if r["loss/main"] is not None]
    assert rows["last loss"][2] == f"{sum(losses) / len(losses):.4f}"
    shorter = [2 * float(r["loss/main"]) for r in train[:6] if r["loss/main"] is not None]
    assert rows["last loss"][3] == f"{sum(shorter) / len(shorter):.4f}"
    value = next(r for r in records if r["kind"] == "validation" and r["step"] == 6)
    common = f"{value['validation/loss']:.4f}"
    assert rows["validation at step 6"][4:] == [common, common, "same"]
    assert ["seed", "1234", "7"] in [line.split() for line in out.splitlines()]


def test_equal_recipes_are_said_to_be_the_same(copy: Copy, capsys: pytest.CaptureFixture[str]):
    assert run(["compare", str(copy("a")), str(copy("b"))]) == 0
    assert "\nthe recipes are the same\n" in capsys.readouterr().out


def test_the_changes_of_a_recipe_are_kept_with_each_start(trained: Path):
    starts = json.loads((trained / "provenance.json").read_text())["starts"]
    assert [start["extends"] for start in starts] == [["tiny/smoke"]] * 2
    changes = {c["setting"]: (c["parent"], c["value"]) for c in starts[0]["changes"]}
    assert changes["schedule.total_steps"] == ("6", "9")
    assert changes["name"] == ('"smoke"', '"base"')
    # from the command line
    assert changes["logging.every_steps"] == ("not set", "1")
    # what the file repeats, and what nobody set, is no change
    assert not {"schedule.peak", "schedule.warmup_steps", "seed"} & changes.keys()
