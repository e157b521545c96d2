"""Sources that a recipe names as text: prepared once into the cache, by real commands."""

import json
import os
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.data.config import DataConfig
from nemotron.data.folder import read_manifest
from nemotron.recipe.load import load_recipe

SMOKE = ["train", "tiny/smoke", "device=cpu", "schedule.total_steps=4", "evaluation.tokens=64"]
LINE = "The river runs to the sea, and stone number {} stays where it was.\n"


@pytest.fixture
def texts(tmp_path: Path, monkeypatch) -> Path:
    """Return a folder of texts in the current folder, as an editor on Windows might leave it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "0.txt").write_text("never read")
    (folder / "notes.ipynb").write_text("{}")
    for number in range(40):
        text = LINE.format(number).replace("\n", "\r\n") * 3
        (folder / f"{number}.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return folder


def prepared(folder: Path) -> list[Path]:
    return sorted(folder.glob("runs/.cache/*/manifest.json"))


def test_a_folder_of_text_is_trained_on_and_its_run_goes_on(texts: Path, tmp_path: Path, capfd):
    assert run([*SMOKE, "data.sources=[texts/]", "--stop-at", "2"]) == 75
    said = capfd.readouterr()
    assert "preparing texts/: 40 inputs, 0.0 MB, into" in said.out
    assert "data       texts: 100.0% of the tokens" in said.out
    manifest = read_manifest(prepared(tmp_path)[0].parent)
    assert manifest is not None
    assert manifest.counts.rows == 40
    assert manifest.counts.held_out_documents > 0
    # the mark of byte order is no text: three bytes less in each file
    assert manifest.counts.text_bytes == sum(p.stat().st_size - 3 for p in texts.glob("*.txt"))
    assert run(["train", "runs/smoke/recipe.yaml", "--resume"]) == 0
    said = capfd.readouterr()
    assert "preparing" not in said.out
    assert "validation loss" in said.out
    assert len(prepared(tmp_path)) == 1


def test_a_source_that_changed_is_prepared_anew_and_refused_for_the_old_run(
    texts: Path, tmp_path: Path, capfd
):
    assert run([*SMOKE, "data.sources=texts", "--stop-at", "2"]) == 75
    (texts / "0.txt").write_text("Another text that was not there before.")
    assert run(["train", "runs/smoke/recipe.yaml", "--resume"]) == 2
    assert (
        "texts: differs from the data that the checkpoint was trained on" in capfd.readouterr().err
    )
    # written again with the same bytes, it is the same data, whatever its time of change
    (texts / "0.txt").write_bytes(
        b"\xef\xbb\xbf" + LINE.format(0).replace("\n", "\r\n").encode() * 3
    )
    assert run(["train", "runs/smoke/recipe.yaml", "--resume"]) == 0


def test_a_damaged_folder_of_the_cache_is_made_again(texts: Path, tmp_path: Path):
    assert run(["data", "plan", "tiny/smoke", "data.sources=[texts]"]) == 0
    shard = next(prepared(tmp_path)[0].parent.glob("*.bin"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    assert run(["data", "plan", "tiny/smoke", "data.sources=[texts]"]) == 0
    assert shard.read_bytes() == whole
    assert run(["data", "inspect", "texts", "--check", "--rows", "0"]) == 0


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("texts/", {"name": "texts", "path": "texts/"}),
        ("a/b/c.jsonl.gz", {"name": "c", "path": "a/b/c.jsonl.gz"}),
        ("a/*.txt", {"name": "a", "path": "a/*.txt"}),
        ("hf://owner/set", {"name": "set", "path": "hf://owner/set"}),
        ("..", {"name": "text", "path": ".."}),
        ("code", {"name": "code", "path": None}),
        ("code/", {"name": "code", "path": "code/"}),
        ({"path": "x/y"}, {"name": "y", "path": "x/y"}),
    ],
)
def test_a_path_alone_is_a_source(given, named: dict):
    [source] = DataConfig(sources=[given]).sources
    assert {"name": source.name, "path": source.path} == named


def test_sets_and_members_of_groups_may_be_paths_alone(texts: Path, tmp_path: Path):
    (tmp_path / "held.md").write_text(LINE.format("x") * 9)
    path = tmp_path / "a.yaml"
    path.write_text(
        "extends: tiny/smoke\nname: a\ndata:\n  sources: [{name: g, sources: [texts, verse]}]\n"
        "  validation: [held.md]\n"
    )
    data = load_recipe(path).config.data
    assert [source.name for source in data.sources[0].sources] == ["texts", "verse"]
    assert data.validation[0].name == "held"
    assert run(["data", "inspect", str(path), "--rows", "0"]) == 0
    assert {p.parent.name.split("-")[0] for p in prepared(tmp_path)} == {"texts", "verse", "held"}


def test_what_this_program_wrote_is_not_read_as_text(texts: Path, tmp_path: Path, capfd):
    assert run([*SMOKE, "data.sources=[texts/]", "--stop-at", "1"]) == 75
    assert run(["data", "prepare", "texts", "--out", "shards"]) == 0
    capfd.readouterr()
    assert run(["data", "prepare", ".", "--out", "all", "--dry-run"]) == 0
    assert "40 inputs" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"messages": []}, "has no column text (its columns: messages); for conversations use"),
        ({"text": 3}, "has a text that is not text"),
    ],
)
def test_a_file_without_text_is_refused_in_a_sentence(texts: Path, capfd, content, said: str):
    Path("rows.jsonl").write_text(json.dumps(content) + "\n")
    assert run([*SMOKE, "data.sources=[rows.jsonl]"]) == 2
    assert said in capfd.readouterr().err
    Path("rows.jsonl").write_text((json.dumps(content) + "\n") * 101)
    assert run([*SMOKE, "data.sources=[rows.jsonl]"]) == 2
    assert "`nemotron data prepare` takes others" in capfd.readouterr().err
    assert not Path("runs/smoke").exists()


def test_a_folder_without_text_and_a_short_text_are_refused(texts: Path, tmp_path: Path, capfd):
    os.mkdir("empty")
    assert run([*SMOKE, "data.sources=[empty]"]) == 2
    assert "contains neither manifest.json nor shards (*.idx), nor text" in capfd.readouterr().err
    Path("short.txt").write_text("A few words.")
    assert run([*SMOKE, "data.sources=[short.txt]", "data.validation_fraction=0"]) == 2
    assert "short (" in (said := capfd.readouterr().err)
    assert "tokens to train on, but a row of data.seq_len = 64 takes 65" in said
