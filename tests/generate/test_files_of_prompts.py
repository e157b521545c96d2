"""Prompts from a file: answers in order, a run that was cut off continued, and what is refused."""

import json
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError
from nemotron.generate.batch import LINE_EVERY_S, BatchProgress, answers_in_order
from nemotron.generate.command import Continuation, generate, generate_file
from nemotron.generate.engine import Engine
from nemotron.generate.prompts import read_prompts
from nemotron.generate.request import Answer, Request
from nemotron.generate.sampling import Sampling
from nemotron.model.hybrid import HybridLM
from tests.support.writer import build_writer

TOKENIZER = load_tokenizer("embedded")
WANTED = Continuation(Sampling(1.0, seed=9), 9, device="cpu")
ROWS = [
    {"prompt": text, "id": number} for number, text in enumerate(["The first", "é", "The first"])
]


def build() -> HybridLM:
    return build_writer(TOKENIZER.vocab_size)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)).replace("\n", "\n\n", 1) + "\n")
    return path


def test_answers_are_those_of_the_prompts_in_their_order(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "answers.jsonl"
    assert generate_file(build(), TOKENIZER, prompts, out, WANTED) == 0
    assert "3 of 3 prompts (100%)" in capsys.readouterr().err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["line"] for row in found] == [1, 3, 4]
    assert [row["id"] for row in found] == [0, 1, 2]
    assert all(row["finish"] == "length" and row["num_tokens"] == 9 for row in found)
    assert found[0]["answer"] != found[2]["answer"]
    texts = [row["prompt"] for row in ROWS]
    generate(build(), TOKENIZER, texts, WANTED)
    printed = capsys.readouterr().out
    assert printed == "\n\n".join(row["prompt"] + row["answer"] for row in found) + "\n"
    generate_file(build(), TOKENIZER, prompts, None, WANTED)
    assert capsys.readouterr().out == out.read_text()


@pytest.mark.parametrize("kept", [0, 7, 30, 200, 100_000])
def test_a_run_that_was_cut_anywhere_is_continued(prompts: Path, tmp_path: Path, kept: int):
    out = tmp_path / "answers.jsonl"
    generate_file(build(), TOKENIZER, prompts, out, WANTED)
    whole = out.read_bytes()
    out.write_bytes(whole[:kept])
    generate_file(build(), TOKENIZER, prompts, out, WANTED, resume=True)
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [b"The first\n", b"my notes", b'{"line": 1, "prompt": "other"}\n', b"\n" * 9, b"[1]\n"],
)
def test_a_file_of_something_else_is_neither_continued_nor_changed(
    prompts: Path, tmp_path: Path, content: bytes
):
    out = tmp_path / "notes.txt"
    out.write_bytes(content)
    with pytest.raises(UserError, match="holds other lines"):
        generate_file(build(), TOKENIZER, prompts, out, WANTED, resume=True)
    with pytest.raises(UserError, match="exists; give another name, or continue it"):
        generate_file(build(), TOKENIZER, prompts, out, WANTED)
    assert out.read_bytes() == content
    before = prompts.read_bytes()
    with pytest.raises(UserError, match="holds other lines"):
        generate_file(build(), TOKENIZER, prompts, prompts, WANTED, resume=True)
    assert prompts.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n', "a.jsonl, line 1: has no prompt"),
        ("a.jsonl", b'\n{"prompt": 1}\n', "a.jsonl, line 2: has no prompt"),
        ("a.jsonl", b'{"prompt": "a"\n', "a.jsonl, line 1: is not JSON"),
        ("a.jsonl", b'{"prompt": "a", "answer": "b"}\n', "line 1: answer is a field of the output"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "a.jsonl, line 1: is not JSON"),
        ("a.txt", b"\n \n", "a.txt: has no prompt"),
        ("a.txt", b"\xff\n", "a.txt: is not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ""}\n', "a.jsonl: line 2 is empty"),
    ],
)
def test_an_impossible_file_is_refused(tmp_path: Path, name: str, content: bytes, words: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        generate_file(build(), TOKENIZER, path, tmp_path / "out", WANTED)
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_lines_of_text_are_prompts(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfOne\r\n\n two \n")
    assert [(line.number, line.prompt) for line in read_prompts(path)] == [(1, "One"), (3, " two ")]


@pytest.mark.parametrize(
    "words",
    [[], ["--prompt", "a", "--prompts", "b"], ["--prompt", "a", "--resume"],
     ["--prompts", "b", "--resume"], ["--prompt", "a", "--out", "c"]],
)  # fmt: skip
def test_options_that_exclude_each_other_are_refused(words: list[str], capsys):
    assert run(["generate", "nowhere", *words]) == 2
    assert "give" in capsys.readouterr().err


def test_a_long_answer_holds_back_a_bounded_number_of_others():
    engine = Engine(build(), {3}, tokenizer=TOKENIZER, slots=2)
    lengths = [90, *[1] * 40]
    requests = [Request([5], length, Sampling(0.0)) for length in lengths]
    answers = answers_in_order(engine, requests)
    assert len(next(answers).tokens) == 90
    assert engine._next_number < 20
    assert len(list(answers)) == 40
    assert engine.is_idle


def test_progress_is_said_now_and_then(capsys: pytest.CaptureFixture[str]):
    clock = iter([0.0, LINE_EVERY_S / 2, 20.0, 20.0])
    progress = BatchProgress(1200, 200, now=lambda: next(clock))
    progress.add(Answer([1, 2]))
    assert not capsys.readouterr().err
    progress.add(Answer([1, 2]))
    assert capsys.readouterr().err == "202 of 1,200 prompts (17%), 0.2 tokens/s, 9,980 s left\n"
