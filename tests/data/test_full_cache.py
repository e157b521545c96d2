"""Caches on a disk without room: one sentence, and the same command goes on later."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron.cli import run
from tests.support.fine_tuning import Workplace, chats, write_recipe, write_rows
from tests.support.preferences import pairs
from tests.support.small_disk import Filler, small_disk

SMOKE = str(Path(__file__).parents[2] / "recipes/tiny/smoke.yaml")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size="100k") as folder:
        Filler(folder)
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedded text", "packed rows", "conversations", "preferences"])
def test_a_full_disk_of_the_cache_is_one_sentence_and_the_command_goes_on_later(
    kind: str,
    full: Path,
    tmp_path: Path,
    workplace: Workplace,
    capsys: pytest.CaptureFixture[str],
):
    command = ["train", recipe(kind, tmp_path, workplace), f"output={tmp_path}", "name=new"]
    command += [f"data.cache={full / 'cache'}", "device=cpu", "--stop-at", "1"]
    capsys.readouterr()
    assert run(command) == 1
    [said] = capsys.readouterr().err.splitlines()
    assert str(full / "cache") in said
    assert "No space left on device; " in said
    (full / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", full], check=True)
    assert run(command) == 75
    assert list(full.glob("cache/*"))
    assert not [*full.glob("cache/*.tmp"), *full.glob("cache/*.work")]


def recipe(kind: str, folder: Path, workplace: Workplace) -> str:
    """Return the recipe of a run that writes this kind of entry into its cache."""
    if kind == "embedded text":
        return SMOKE
    rows = [row for row in chats() if "tools" not in row]
    path = write_rows(folder / "rows.jsonl", pairs() if kind == "preferences" else rows)
    if kind == "packed rows":
        out = folder / "prepared"
        prepare = ["data", "prepare", str(path), "--out", str(out), "--chat", "--hold-out", "0.3"]
        assert run([*prepare, "--workers", "1"]) == 0
        path = out
    data: dict[str, Any] = {"sources": [{"name": "own", "path": str(path)}]}
    if kind == "packed rows":
        data["validation_fraction"] = 0.0
    values = workplace.values("new", data=data, batch={"micro_batch": 1})
    if kind == "preferences":
        values["stage"] = "dpo"
    return str(write_recipe(folder / "recipe.yaml", values))
