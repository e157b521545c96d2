"""A merge that is killed at any moment leaves the old folder, the new one, or none."""

import json
import shutil
from pathlib import Path

import pytest

from nemotron.checkpoint.manifest import verify
from nemotron.checkpoint.read import locate
from nemotron.cli import run
from nemotron.files import hash_file
from tests.support.forked import Forked
from tests.support.killed import KILLED, run_until

MOMENTS = 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    words = ["train", "tiny/smoke", f"output={folder}", "name=trained", "--plain"]
    words += ["checkpoint.every_steps=1", "checkpoint.keep=9", "schedule.total_steps=3"]
    words += ["schedule.warmup_steps=1", "schedule.decay_steps=1", "evaluation.tokens=512"]
    assert run(words) == 0
    return folder / "trained"


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shape(folder: Path) -> str:
    """Check a merged run, and return the shape with which it was averaged."""
    verify(locate(folder).info.folder)
    marked = json.loads((folder / ".nemotron.json").read_text())["files"]
    there = {name: (folder / name).stat().st_size for name in files(folder)}
    del there[".nemotron.json"]
    assert there == {name: size for name, size in marked.items() if not name.endswith("/")}
    return json.loads((folder / "provenance.json").read_text())["merged"]["shape"]


@pytest.mark.slow
@pytest.mark.parametrize("overwrites", [False, True])
def test_a_killed_merge_leaves_a_whole_folder_or_none(
    trained: Path, tmp_path: Path, overwrites: bool
):
    source = files(trained)
    words = ["merge", str(trained), "--out", str(tmp_path / "home/merged"), "--overwrite"]
    home = tmp_path / "home"

    old = tmp_path / "old"
    assert run(["merge", str(trained), "--out", str(old), "--shape", "uniform"]) == 0

    def end(moment: int) -> int:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        if overwrites:
            shutil.copytree(old, home / "merged")
        job = Forked(
            run_until,
            [*words, "--shape", "ema"],
            home,
            moment,
            tmp_path / "counted",
            output=tmp_path / f"{moment}.txt",
        )
        return job.wait(60)

    assert end(0) == 0
    changes = int((tmp_path / "counted").read_text())
    assert changes >= MOMENTS
    found = []
    for moment in sorted({1 + part * (changes - 1) // (MOMENTS - 1) for part in range(MOMENTS)}):
        assert end(moment) == KILLED
        merged = home / "merged"
        found.append(shape(merged) if merged.exists() else "none")
        assert files(trained) == source
        # the next one is not in the way of what was left, and leaves nothing of it
        assert run([*words, "--shape", "ema"]) == 0
        assert shape(merged) == "ema"
        assert [path.name for path in home.iterdir()] == ["merged"]
    assert found[0] == ("uniform" if overwrites else "none")
