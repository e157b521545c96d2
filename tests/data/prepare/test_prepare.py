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
from nemotron.data.indexed import LEARNED, Shard
from nemotron.data.prepare import inputs
from nemotron.data.tokenizer import load_tokenizer
from tests.support.cases import further

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


@pytest.mark.slow
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
@pytest.mark.parametrize("moments", [4, further(10)])
def test_killed_at_many_moments_it_ends_with_the_same_bytes(world: Path, moments: int):
    draw = random.Random(1)
    shutil.rmtree(world / "killed", ignore_errors=True)
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
        if kills < moments and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if (world / "killed").exists():
            if kills >= moments:
                break
            for leftover in ("killed", "killed.work"):
                shutil.rmtree(world / leftover, ignore_errors=True)
        assert attempt < 39
    assert kills == moments
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
    made = {p.name: p.stat().st_mtime_ns for p in (world / "again.partial").glob("train*")}
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
    assert "mixed.partial: was started with other input or options" in capsys.readouterr().err


@pytest.mark.slow
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
        assert done.returncode == 1, done.stderr
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
@pytest.mark.parametrize("seen", [further("plan.json"), "unit-*.json"])
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
        (["nowhere"], "nowhere: does not exist; name files, folders or patterns"),
        (["empty.jsonl"], "there is no document to train on (no rows)"),
        (["blank.txt"], "there is no document to train on (rows 1, empty 1)"),
        (["in", "--column", "body"], "has no column body (its columns: text, number)"),
        (["in", "--tokenizer", "none.json"], "--tokenizer = "),
        (["in", "--eod-token", "<end>"], "has no token '<end>'"),
        (["in", "--filter", "number"], "--filter = number is not a comparison"),
        (["in/a.jsonl", "--filter", "number < 0"], "there is no document to train on (rows 300, "),
        (
            ["in/a.jsonl", "--filter", "numbre != 0"],
            "filtered 300; of a --filter, in/a.jsonl:1 has no column numbre)",
        ),
        (["list.json"], "list.json:1 is a JSON list, with all rows in it, but not an object"),
        (["in", "--filter", "number > 0"], "chooses among rows, but in/c.txt is text without rows"),
        (["in/c.txt", "--column", "body"], "--column = body has no effect on text"),
        (["in/a.jsonl", "--chat", "--column", "body"], "--column = body has no effect with --chat"),
        (["in/a.jsonl", "--separator", "\\n"], "--separator has no effect without a text file"),
        (["in", "--subset", "x"], "--subset has no effect without a data set (hf://...)"),
        (["in", "--split", "x"], "--split has no effect without a data set (hf://...)"),
        (["in", "--streaming"], "--streaming has no effect without a data set (hf://...)"),
        (["hf://nobody/nothing"], "hf://nobody/nothing: cannot be loaded"),
        (["in/c.txt", "--chat"], "c.txt: is text; conversations are read from"),
    ],
)
def test_a_mistake_leaves_nothing_behind(
    world: Path, monkeypatch, capsys, arguments: list[str], sentence: str
):
    monkeypatch.chdir(world)
    Path("empty.jsonl").touch()
    Path("blank.txt").touch()
    Path("list.json").write_text('[{"text": "one"}, {"text": "two"}]')
    before = sorted(os.listdir(world))
    code = run(["data", "prepare", *arguments, "--out", "none", "--max-bad-rows", "0"])
    error = capsys.readouterr().err
    assert code == 2, error
    assert sentence in error
    assert "Traceback" not in error
    shutil.rmtree("none.partial", ignore_errors=True)
    shutil.rmtree("none.work", ignore_errors=True)
    assert sorted(os.listdir(world)) == before


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path, monkeypatch, capsys):
    """A file of another kind, a link to a folder or to nothing would otherwise be missed."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("in", "a.txt").write_text("One document.")
    Path("elsewhere").mkdir()
    for name in ("b.html", "c.html", "d.py", "LICENSE", ".hidden"):
        Path("in", name).write_text("x")
    Path("in", "linked").symlink_to("../elsewhere")
    Path("in", "lost.txt").symlink_to("nowhere.txt")
    sentence = (
        "in: not read: 2 .html, 2 links to folders or to nothing, 1 without ending, 1 .py; files"
    )
    assert run(["data", "prepare", "in", "--out", "out", "--dry-run"]) == 0
    assert sentence in capsys.readouterr().err
    assert run(["data", "tokenizer", "in", "--out", "t.json", "--vocab-size", "400"]) == 0
    assert sentence in capsys.readouterr().err
    script = [sys.executable, "-m", "nemotron", "data", "prepare", "in", "--out", "out"]
    ended = subprocess.run(script, check=True, capture_output=True, text=True)
    assert sentence in ended.stderr
    assert "out: 1 documents" in ended.stdout


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


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("sources", "out", "sentence"),
    [
        (["d"], "d", "a.jsonl: is an input and lies in d"),
        (["d/deep"], "d", "b.jsonl: is an input and lies in d"),
        (["d/*.jsonl"], "d", "a.jsonl: is an input and lies in d"),
        (["linked"], "d", "a.jsonl: is an input and lies in d"),
        (["d"], "linked", "a.jsonl: is an input and lies in linked"),
        (["d/a.jsonl"], ".", "a.jsonl: is an input and lies in /"),
        (
            ["d/a.jsonl", "--tokenizer", "keep/tokenizer.json"],
            "keep",
            "tokenizer.json: is an input",
        ),
        (["d"], "other", "other: has no .nemotron.json of nemotron data prepare"),
        (["d"], "half", "half.partial: was not left by an earlier data prepare"),
        (["d"], "work", "work.work: was not left by an earlier data prepare"),
        (["half.partial"], "half", "c.txt: is an input and lies in half.partial"),
    ],
)
def test_overwriting_deletes_nothing_that_the_command_did_not_write(
    tmp_path: Path, monkeypatch, capsys, sources: list[str], out: str, sentence: str
):
    monkeypatch.chdir(tmp_path)
    for name in ("d/deep", "other", "half.partial", "work.work", "keep"):
        Path(name).mkdir(parents=True)
    for name in ("d/a.jsonl", "d/deep/b.jsonl", "other/thesis.tex", "work.work/plan.txt"):
        Path(name).write_text('{"text": "words"}\n')
    Path("half.partial/c.txt").write_text("mine")
    Path("linked").symlink_to("d")
    TOKENIZER.save(Path("keep/tokenizer.json"))
    before = tree(tmp_path)
    assert run(["data", "prepare", *sources, "--out", out, "--overwrite", "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    after = tree(tmp_path)
    assert before == {name: after[name] for name in before}
    assert not [name for name in after if "train-" in name]


def test_an_output_inside_its_source_is_never_read_and_replaced_only_while_all_is_ours(
    tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("d/.ipynb_checkpoints").mkdir(parents=True)
    Path("d/a.jsonl").write_text('{"text": "words"}\n')
    Path("d/.ipynb_checkpoints/a.jsonl").write_text('{"text": "an old version"}\n')
    arguments = ["data", "prepare", "d", "--out", "d/out", "--hold-out", "0", "--workers", "1"]
    for again in ([], [], ["--overwrite"]):
        assert run([*arguments, *again]) == 0
        assert "1 documents with" in capsys.readouterr().out
    assert sorted(os.listdir("d")) == [".ipynb_checkpoints", "a.jsonl", "out"]
    Path("d/out/notes.txt").write_text("mine")
    assert run([*arguments, "--overwrite"]) == 2
    assert "d/out/notes.txt: is not of nemotron data prepare" in capsys.readouterr().err
    assert Path("d/out/notes.txt").read_text() == "mine"


def bad_utf8(values: list[bytes]) -> pyarrow.Array:
    return pyarrow.Array.from_buffers(
        pyarrow.string(), len(values), pyarrow.array(values, pyarrow.binary()).buffers()
    )


def test_one_bad_row_never_ends_a_preparation(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    deep = "[" * 100_000 + "]" * 100_000
    Path("a.jsonl").write_text(
        '{"text": "first"}\n{"text": "half \\ud83d"}\n{"text": "second"}\n'
        + f'{{"text": {deep}}}\n{{"text": {"9" * 5000}}}\n{{"\\ud800\\u001b[31m": "x"}}\n'
    )
    columns = {
        "text": bad_utf8([b"third", b"\xff\xfe", b"fourth"]),
        "lang": bad_utf8([b"en", b"en", b"\xc3"]),
        "unread": bad_utf8([b"\xff"] * 3),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), "b.parquet")
    options = ["--hold-out", "0", "--workers", "1"]
    assert run(["data", "prepare", "a.jsonl", "b.parquet", "--out", "out", *options]) == 0
    assert texts_of(Path("out"), "train") == ["first", "second", "third", "fourth"]
    bad = read_manifest(Path("out")).bad_rows
    assert bad == (
        "a.jsonl:2 has a text with a lone surrogate, which is not a character",
        "a.jsonl:4 is not valid JSON (nested too deep)",
        "a.jsonl:5 is not valid JSON (a number is too long)",
        "a.jsonl:6 has no column text (its columns: \\ud800\\x1b[31m)",
        "b.parquet row 1 has a text that is not UTF-8 text",
    )
    arguments = ["data", "prepare", "b.parquet", "--filter", "lang == en", *options]
    assert run([*arguments, "--out", "filtered"]) == 0
    assert texts_of(Path("filtered"), "train") == ["third"]
    assert (
        "b.parquet row 2 has a lang that is not UTF-8 text"
        in read_manifest(Path("filtered")).bad_rows
    )
    capsys.readouterr()
    assert run([*arguments, "--column", "body", "--out", "none"]) == 2
    error = capsys.readouterr().err
    assert "(rows 3, bad 3; the first bad one: b.parquet row 0 has no column body" in error
    assert "(its columns: text, lang, unread)" in error


def conversation(**answer: object) -> dict:
    return {
        "messages": [
            {"role": "user", "content": "Say it."},
            {"role": "assistant", "content": "No.", **answer},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": "Yes."},
        ]
    }


def learned_of(folder: Path) -> list[str]:
    found = []
    for facts in read_manifest(folder).train:
        shard = Shard(folder / facts.name)
        ids = shard.tokens[shard.roles == LEARNED]
        found.append(TOKENIZER.decode(ids.tolist()))
    return found


def prepare_chats(rows: list[dict], name: str, *arguments: str, table: bool = False) -> int:
    path = f"{name}.{'parquet' if table else 'jsonl'}"
    if table:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--chat", "--hold-out", "0", "--workers", "1", *arguments]
    return run(["data", "prepare", path, "--out", name, *options])


def test_deep_and_broken_conversations_are_bad_rows(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deep = "[" * 100_000 + "]" * 100_000
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": deep}}]}
    rows = [
        {"messages": deep},
        {"messages": [call], "tools": [{"name": "f"}]},
        conversation(content="half \ud83d"),
        conversation(),
    ]
    assert prepare_chats(rows, "chats") == 0
    assert read_manifest(Path("chats")).bad_rows == (
        "chats.jsonl:1 is nested too deep",
        "chats.jsonl:2 messages[0].tool_calls[0]: the arguments of f are nested too deep; "
        "write them flat.",
        "chats.jsonl:3 has a text with a lone surrogate, which is not a character",
    )


@pytest.mark.parametrize("table", [False, True], ids=["lines", "table"])
def test_what_a_message_says_about_learning_is_followed(tmp_path: Path, monkeypatch, table: bool):
    monkeypatch.chdir(tmp_path)
    for name, mark, learns in [
        ("all", {}, True), ("one", {"weight": 1}, True), ("zero", {"weight": 0}, False),
        ("off", {"train": False}, False),
    ]:  # fmt: skip
        assert prepare_chats([conversation(**mark)], name, table=table) == 0
        (learned,) = learned_of(Path(name))
        assert ("No." in learned) == learns
        assert "Yes." in learned
    assert prepare_chats([conversation(), conversation(weight=0.5)], "bad") == 0
    (bad,) = read_manifest(Path("bad")).bad_rows
    assert "messages[1].weight is 0.5; give 0 (not learned) or 1" in bad


def test_other_forms_of_conversations_are_recognized_or_refused_by_name(
    tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "Yes."}]
    for table in (False, True):
        assert prepare_chats([{"conversations": turns}], "refused", table=table) == 2
        way = "ShareGPT form use nemotron data prepare --chat --messages conversations"
        assert way in capsys.readouterr().err
        name, column = f"share{table}", ("--messages", "conversations")
        assert prepare_chats([{"conversations": turns}], name, *column, table=table) == 0
        assert "Yes." in learned_of(Path(name))[0]
        alpaca = {"instruction": "Say it.", "input": "", "output": "Yes."}
        assert prepare_chats([alpaca], "alpaca", table=table) == 2
        assert "Alpaca form must be converted" in capsys.readouterr().err
    calls = [*turns, {"from": "observation", "value": "{}"}]
    assert prepare_chats([{"messages": calls}], "calls") == 2
    assert "messages[2].from is 'observation'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--messages", "conversations"], "--messages"),
        (["--no-thinking"], "--no-thinking"),
        (["--no-reasoning", "0.5"], "--no-reasoning"),
    ],
)
def test_an_option_of_conversations_alone_is_refused(
    tmp_path: Path, capsys, words: list[str], option: str
):
    (tmp_path / "a.jsonl").write_text('{"text": "Rain."}\n')
    command = ["data", "prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o"), *words]
    assert run(command) == 2
    said = capsys.readouterr().err
    assert said == f"nemotron: {option} goes with --chat; give it, too.\n"
    assert not (tmp_path / "o").exists()


def test_members_that_a_table_filled_with_null_are_absent(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def row(name: str, parameter: str) -> dict:
        schema = {"type": "object", "properties": {parameter: {"type": "string"}}}
        call = {"function": {"name": name, "arguments": {parameter: "7"}}}
        return {
            "messages": [
                {"role": "user", "content": "Do it."},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ],
            "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}],
        }

    rows = [row("f", "x"), row("g", "y")]
    assert prepare_chats(rows, "lines") == 0
    assert prepare_chats(rows, "table", table=True) == 0
    assert learned_of(Path("table")) == learned_of(Path("lines"))
    assert "None" not in learned_of(Path("table"))[0]
    # one tool, not in a list, and tools as an object of lists
    alone = [r | {"tools": r["tools"][0]} for r in rows]
    assert prepare_chats(alone, "alone", table=True) == 0
    spread = [r | {"tools": {key: [r["tools"][0][key]] for key in r["tools"][0]}} for r in rows]
    assert prepare_chats(spread, "spread", table=True) == 0
    for name in ("alone", "spread"):
        assert learned_of(Path(name)) == learned_of(Path("lines"))
    # JSON lines say null themselves
    explicit = row("f", "x")
    explicit["messages"][1]["tool_calls"][0]["function"]["arguments"]["x"] = None
    assert prepare_chats([explicit], "null") == 0
    assert "None" in learned_of(Path("null"))[0]


def test_an_output_is_not_used_again_when_a_source_has_changed_at_equal_size(
    tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "words"}\n')
    stamp = os.stat("a.jsonl").st_mtime_ns
    arguments = ["data", "prepare", "a.jsonl", "--out", "out", "--hold-out", "0", "--workers", "1"]
    assert run(arguments) == 0
    os.utime("a.jsonl", ns=(stamp + 10**9, stamp + 10**9))
    assert run(arguments) == 0  # a copy of the same content
    Path("a.jsonl").write_text('{"text": "other"}\n')
    os.utime("a.jsonl", ns=(stamp, stamp))
    assert run(arguments) == 2
    assert "a.jsonl: was changed since out was prepared from it" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 0
    assert texts_of(Path("out"), "train") == ["other"]
