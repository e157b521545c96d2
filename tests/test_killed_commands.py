"""Commands that are killed at any moment leave what was there, the whole new output, or none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.outputs import MARK, writing_beside
from nemotron.report.page import HEAD
from tests.support.forked import Forked
from tests.support.moments import watch_moments

LEAST = 10
"""Moments of a command that writes a folder."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    words = ["train", "tiny/smoke", f"output={folder}", "name=trained", "model.moe_latent_size=32"]
    words += ["checkpoint.every_steps=1", "schedule.total_steps=2", "schedule.warmup_steps=1"]
    words += ["schedule.decay_steps=1", "evaluation.tokens=64", "device=cpu"]
    assert run(words) == 0
    assert run(["export", str(folder / "trained"), "--out", str(folder / "e"), "--no-check"]) == 0
    return folder / "trained"


def moments(words: list[str], home: Path) -> list[Path]:
    """Return copies of the folder `home` from each moment of a command, and the folder itself."""
    copies = home.parent / "copies"
    copies.mkdir()
    output = home.parent / "output.txt"
    job = Forked(watch_moments, words, home, copies, output=output)
    assert job.wait(120) == 0, output.read_text()
    return [*sorted(copies.iterdir(), key=lambda copy: int(copy.name)), home]


def content(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def is_whole(folder: Path) -> bool:
    """Say whether all is there that the mark of a finished folder names, and nothing else."""
    marked = json.loads((folder / MARK).read_text())["files"]
    there = content(folder)
    del there[MARK]
    return there == {name: size for name, size in marked.items() if not name.endswith("/")}


FOLDERS: dict[str, Callable[[Path], list[str]]] = {
    "quantize": lambda trained: [str(trained), "--preset", "nvfp4", "--rows", "1", "--no-check"],
    "export": lambda trained: [str(trained), "--no-check"],
    "import": lambda trained: [str(trained.parent / "e")],
    "merge": lambda trained: [str(trained), "--shape", "uniform"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_is_whole_or_not_there(trained: Path, tmp_path: Path, command: str):
    home = tmp_path / "home"
    words = [command, *FOLDERS[command](trained), "--out", str(home / "new"), "--overwrite"]
    home.mkdir()
    assert run(words) == 0
    (home / "new" / MARK).rename(home / "mark")  # an older mark, to know the folder by
    marked = json.loads((home / "mark").read_text())
    (home / "new" / MARK).write_text(json.dumps(marked, indent=3))
    (home / "mark").unlink()
    old = (home / "new" / MARK).read_bytes()
    found = moments(words, home)
    assert len(found) > LEAST
    kinds = []
    for copy in found:
        if not (copy / "new").exists():
            # the old one has another name for the time of a rename
            kinds.append("none")
            [moved] = copy.glob(".new.old-*")
            assert is_whole(moved)
        else:
            assert is_whole(copy / "new")
            kinds.append("old" if (copy / "new" / MARK).read_bytes() == old else "new")
        for left in copy.glob(".new.partial"):
            with writing_beside(copy / "new", command) as partial:
                assert partial == left
                assert content(partial).keys() == {MARK}
    assert kinds[0] == "old"
    assert kinds[-1] == "new"
    assert kinds.count("none") <= 1
    assert [path.name for path in home.iterdir()] == ["new"]


FILES: dict[str, Callable[[Path], list[str]]] = {
    "evaluate": lambda trained: [str(trained), "--out"],
    "report": lambda trained: [str(trained), "--out"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", FILES)
def test_a_file_is_whole_or_not_there(trained: Path, tmp_path: Path, command: str):
    home = tmp_path / "home"
    home.mkdir()
    found = moments([command, *FILES[command](trained), str(home / "new")], home)
    whole = (home / "new").read_bytes()
    assert whole.startswith(b"{" if command == "evaluate" else HEAD.encode())
    there = [(copy / "new").read_bytes() for copy in found if (copy / "new").exists()]
    assert len(there) < len(found)
    assert set(there) == {whole}
    # what a kill leaves beside it is in nobody's way
    left = [path.name for copy in found for path in copy.iterdir() if path.name != "new"]
    assert all(name.startswith(".new.") and name.endswith(".tmp") for name in left)


@pytest.mark.slow
def test_an_evaluation_is_continued_from_any_moment(trained: Path, tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    words = ["evaluate", str(trained), "--suite", "mcqa@0", "--tasks", "3", "--max-new-tokens", "4"]
    found = moments([*words, "--out", str(home / "new")], home)
    whole = {name: (home / "new" / name).read_bytes() for name in content(home / "new")}
    assert whole
    for copy in found[:: max(1, len(found) // 4)]:
        if (copy / "new").exists():
            assert run([*words, "--out", str(copy / "new"), "--resume"]) == 0
            there = {name: (copy / "new" / name).read_bytes() for name in whole}
            assert there == whole
        else:
            shutil.rmtree(copy)
