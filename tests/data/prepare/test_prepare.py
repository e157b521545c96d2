"""Preparing a folder: the same bytes whatever happens in between, or one sentence and nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nemotron.cli import run
from nemotron.data.corpus import load_documents
from nemotron.data.folder import read_manifest
from nemotron.data.indexed import Shard
from nemotron.data.prepare import inputs
from nemotron.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("embedded")
PREPARE = """
import sys
from nemotron.data.prepare import inputs
from nemotron.cli import main
if __name__ == "__main__":
    inputs.SMALLEST_UNIT = 40_000
    main(sys.argv[1:])
"""
"""The command, with units so small that little text makes many."""


def command(program: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(program), "data", "prepare", *arguments]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with text, the program, and what comes of it when nothing interferes."""
    world = tmp_path_factory.mktemp("prepare")
    (world / "program.py").write_text(PREPARE)
    texts = load_documents("docs")
    (world / "in").mkdir()
    rows = [json.dumps({"text": text, "number": i}) for i, text in enumerate(texts)]
    (world / "in" / "a.jsonl").write_text("\n".join(rows[:300]) + "\n")
    (world / "in" / "b.jsonl").write_text("\n".join(rows[300:]))
    (world / "in" / "c.txt").write_text("One more document.")
    subprocess.run(
        command(world / "program.py", "in", "--out", "whole", "--workers", "1"),
        cwd=world,
        check=True,
        capture_output=True,
    )
    return world


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_of(folder: Path, side: str) -> list[str]:
    manifest = read_manifest(folder)
    assert manifest is not None
    texts = []
    for facts in getattr(manifest, side):
        shard = Shard(folder / facts.name)
        shard.check()
        for number in range(shard.num_documents):
            document = shard.document(number).tolist()
            assert document[-1] == 2
            texts.append(TOKENIZER.decode(document[:-1]))
    return texts


def test_every_document_is_there_once_in_order_and_some_are_held_out(world: Path):
    given = [*load_documents("docs"), "One more document."]
    train, held_out = (texts_of(world / "whole", side) for side in ("train", "validation"))
    assert held_out
    kept = set(held_out)
    assert train == [text for text in given if text not in kept]
    assert sorted(train + held_out) == sorted(given)
    counts = read_manifest(world / "whole").counts
    assert counts.rows == len(given)
    assert counts.text_bytes == sum(len(text.encode()) for text in given)
    assert len(read_manifest(world / "whole").train) > 10


def test_the_number_of_processes_changes_no_byte(world: Path):
    subprocess.run(
        command(world / "program.py", "in", "--out", "three", "--workers", "3"),
        cwd=world,
        check=True,
        capture_output=True,
    )
    assert content(world / "three") == content(world / "whole")
    assert not (world / "three.partial").exists()
    assert not (world / "three.work").exists()


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_with_the_same_bytes(world: Path):
    draw = random.Random(1)
    kills = 0
    for attempt in range(40):
        process = subprocess.Popen(
            command(world / "program.py", "in", "--out", "killed", "--workers", "2"),
            cwd=world,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        # not before there is something to lose, and then at any moment
        deadline = time.monotonic() + 60
        while not (world / "killed.work" / "plan.json").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 1.6))
        if kills < 10 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if (world / "killed").exists():
            if kills >= 10:
                break
            for leftover in ("killed", "killed.work"):
                shutil.rmtree(world / leftover, ignore_errors=True)
        assert attempt < 39
    assert kills == 10
    assert content(world / "killed") == content(world / "whole")
    assert not (world / "killed.partial").exists()
    assert not (world / "killed.work").exists()


def test_finished_shards_are_not_made_again(world: Path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(inputs, "SMALLEST_UNIT", 40_000)
    arguments = ["data", "prepare", "in", "--out", "again", "--workers", "1"]
    with open(world / "in" / "d.jsonl", "w") as file:
        file.write("no JSON\n")
    assert run([*arguments, "--max-bad-rows", "0"]) == 2
    assert "in/d.jsonl:1 is not valid JSON" in capsys.readouterr().err
    made = {p.name: p.stat().st_mtime_ns for p in (world / "again.partial").iterdir()}
    assert len(made) > 10
    assert not (world / "again").exists()
    assert run(arguments) == 0
    assert "left out: 1 unreadable" in capsys.readouterr().out
    after = {p.name: p.stat().st_mtime_ns for p in (world / "again").iterdir()}
    assert {name: after[name] for name in made} == made
    (world / "in" / "d.jsonl").unlink()


def test_given_again_a_finished_command_says_what_is_there(world: Path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(inputs, "SMALLEST_UNIT", 40_000)
    before = content(world / "whole")
    assert run(["data", "prepare", "in", "--out", "whole"]) == 0
    assert "799 rows" in capsys.readouterr().out
    assert content(world / "whole") == before
    assert run(["data", "prepare", "in", "--out", "whole", "--hold-out", "0.5"]) == 2
    assert "other options; choose another --out" in capsys.readouterr().err
    assert content(world / "whole") == before


def test_a_preparation_begun_with_other_options_is_not_mixed_with_this_one(
    world: Path, monkeypatch, capsys
):
    monkeypatch.chdir(world)
    (world / "bad.jsonl").write_text('{"text": "fine"}\n{}\n')
    arguments = ["data", "prepare", "in/a.jsonl", "bad.jsonl", "--out", "mixed", "--workers", "1"]
    monkeypatch.setattr(inputs, "SMALLEST_UNIT", 40_000)
    assert run([*arguments, "--max-bad-rows", "0"]) == 2
    assert "bad.jsonl:2 has no column text (its columns: none)" in capsys.readouterr().err
    assert (world / "mixed.work").exists()
    assert run([*arguments, "--hold-out", "0.5"]) == 2
    assert "mixed.partial was started with other input or options" in capsys.readouterr().err


def test_a_full_disk_ends_with_a_sentence_and_what_was_finished_stays(world: Path):
    limited = PREPARE.replace(
        "    inputs", "    import resource\n    resource.setrlimit(resource.RLIMIT_FSIZE, "
        "(30_000, 30_000))\n    inputs", 1
    )  # fmt: skip
    (world / "limited.py").write_text(limited)
    for workers in ("1", "2"):
        done = subprocess.run(
            command(world / "limited.py", "in", "--out", "full", "--workers", workers),
            cwd=world,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        assert "cannot be written: File too large; free some space" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (world / "full").exists()
        assert not list((world / "full.partial").glob("*.tmp"))
    subprocess.run(
        command(world / "program.py", "in", "--out", "full", "--workers", "1"),
        cwd=world,
        check=True,
        capture_output=True,
    )
    assert content(world / "full") == content(world / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seen", ["plan.json", "unit-*.json"])
def test_an_interrupt_ends_every_process_without_a_traceback(world: Path, seen: str):
    """Interrupted while its workers start (once the plan is there) or work (once a unit is)."""
    ended = []
    for attempt in range(4):
        name = f"interrupted-{seen[:4]}-{attempt}"
        process = subprocess.Popen(
            command(world / "program.py", "in", "--out", name, "--workers", "2"),
            cwd=world,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        while process.poll() is None and not list((world / f"{name}.work").glob(seen)):
            time.sleep(0.002)
        time.sleep(0.15 * attempt)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output = process.communicate()[0]
        assert "Traceback" not in output
        assert not list((world / f"{name}.partial").glob("*.tmp"))
        ended.append(process.returncode)
    # A command that was faster than the signal has its output, whatever the interpreter says then.
    assert 130 in ended
    assert set(ended) <= {130, 0, -signal.SIGINT}, ended


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere does not exist; name files, folders or patterns"),
        (["empty.jsonl"], "there is no document to train on"),
        (["blank.txt"], "there is no document to train on (rows 1, empty 1)"),
        (["in", "--column", "body"], "has no column body (its columns: text, number)"),
        (["in", "--tokenizer", "none.json"], "--tokenizer: "),
        (["in", "--eod-token", "<end>"], "has no token '<end>'"),
        (["in", "--filter", "number"], "--filter 'number' is not a comparison"),
        (["in/a.jsonl", "--filter", "number < 0"], "there is no document to train on"),
        (["hf://nobody/nothing"], "hf://nobody/nothing cannot be loaded"),
        (["in/c.txt", "--chat"], "c.txt is text; conversations are read from"),
    ],
)
def test_a_mistake_leaves_nothing_behind(
    world: Path, monkeypatch, capsys, arguments: list[str], sentence: str
):
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("empty.jsonl").touch()
    Path("blank.txt").touch()
    before = sorted(os.listdir(world))
    code = run(["data", "prepare", *arguments, "--out", "none", "--max-bad-rows", "0"])
    error = capsys.readouterr().err
    assert code == 2, error
    assert sentence in error
    assert "Traceback" not in error
    shutil.rmtree("none.partial", ignore_errors=True)
    shutil.rmtree("none.work", ignore_errors=True)
    assert sorted(os.listdir(world)) == before


def test_an_unreadable_row_group_ends_with_a_sentence(world: Path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    rows = [{"text": f"Row {i} " * 20} for i in range(200)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "c.parquet", row_group_size=100)
    group = pyarrow.parquet.ParquetFile("c.parquet").metadata.row_group(1)
    with open("c.parquet", "r+b") as file:
        file.seek(group.column(0).data_page_offset)
        file.write(b"\x5a" * 40)
    assert run(["data", "prepare", "c.parquet", "--out", "group"]) == 2
    error = capsys.readouterr().err
    assert "c.parquet: row group 1 (rows 100 on) cannot be read" in error
    assert error.count("\n") == 1
    assert not [name for name in os.listdir() if name.startswith("group")]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["stored", "streamed"])
def test_a_data_set_gives_what_its_files_give(world: Path, monkeypatch, streaming: list[str]):
    # a folder in the place of a name on the hub: the library reads both alike
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(world / "hf"))
    rows = [{"text": text, "number": i} for i, text in enumerate(load_documents("docs")[:200])]
    Path("set").mkdir(exist_ok=True)
    for number, part in enumerate((rows[:120], rows[120:])):
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, f"set/train-{number}.parquet")
    out = f"set-out{len(streaming)}"
    arguments = [f"hf://{world}/set", "--filter", "number != 7", *streaming, "--workers", "1"]
    assert run(["data", "prepare", *arguments, "--out", out]) == 0
    train, held_out = (texts_of(world / out, side) for side in ("train", "validation"))
    assert sorted(train + held_out) == sorted(r["text"] for r in rows if r["number"] != 7)
    assert read_manifest(world / out).counts.filtered == 1


def test_a_dry_run_looks_and_writes_nothing(world: Path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = sorted(os.listdir(world))
    assert run(["data", "prepare", "in", "--out", "dry", "--dry-run"]) == 0
    assert " MB, would become up to 1 shards" in capsys.readouterr().out
    assert sorted(os.listdir(world)) == before
