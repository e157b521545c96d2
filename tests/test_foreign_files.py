"""Pipes, devices and links in the place of files: none is read without an end, none is replaced."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron.checkpoint.records import DamagedCheckpoint, read_record
from nemotron.cli import run
from nemotron.data.codeswitch.words import load_lexicon
from nemotron.data.prepare.inputs import plan
from nemotron.data.prepare.options import PrepareOptions
from nemotron.data.rewrite.score import score_file
from nemotron.errors import UserError
from nemotron.evaluate.sample_file import SampleFile
from nemotron.files import open_lines, write_text
from nemotron.generate.prompts import AnswerFile, read_prompts
from nemotron.posttrain.correct.answers import Files, correct_file
from nemotron.posttrain.pivots import read_turns
from nemotron.posttrain.reverify import read_rollouts

READERS: dict[str, Callable[[Path], Any]] = {
    "prompts": read_prompts,
    "rollouts": lambda path: list(read_rollouts(path)),
    "lexicon": lambda path: load_lexicon(str(path)),
    "record of a checkpoint": lambda path: read_record(path, dict),
    "candidates": lambda path: correct_file(Files(path, path.with_name("out")), refuse),
    "trajectories": lambda path: list(read_turns(path)),
    "corrected answers": lambda path: score_file(path, path, as_json=False),
    "text to prepare": lambda path: plan([str(path)], PrepareOptions()),
    "answers to prompts": lambda path: AnswerFile(path, [], resume=True),
    "answers of an evaluation": lambda path: SampleFile(path, {}),
    "lines": open_lines,
}


def refuse(*_: object) -> Any:
    raise AssertionError("nothing can be corrected")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(60)  # a pipe that nobody writes is waited for without an end
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("make", [pipe, device, Path.mkdir])
def test_what_is_no_file_is_one_sentence(make: Callable, reader: str, tmp_path: Path):
    path = tmp_path / "file.jsonl"
    make(path)
    with pytest.raises((UserError, DamagedCheckpoint, OSError)) as caught:
        READERS[reader](path)
    if isinstance(caught.value, OSError):  # which the outermost guard names
        assert caught.value.strerror == "it is a link"
    assert os.listdir(tmp_path)[0].startswith("file.")


@pytest.mark.parametrize(
    "opens",
    [
        lambda path: AnswerFile(path, [], resume=True),
        lambda path: SampleFile(path, {}),
    ],
    ids=["answers to prompts", "answers of an evaluation"],
)
def test_a_link_is_not_followed_to_a_file_of_others(opens: Callable, tmp_path: Path):
    (tmp_path / "theirs").write_text("without a line end")
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / "samples.jsonl"
    path.symlink_to("../theirs")
    with pytest.raises(UserError, match="it is a link"):
        opens(path)
    assert (tmp_path / "theirs").read_text() == "without a line end"


def test_no_device_and_no_pipe_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "to be or not"}) + "\n")
    for name in ("pipe", "link"):
        out = tmp_path / name
        with pytest.raises(PermissionError, match="not a regular file"):
            write_text(out, "x")
        words = ["data", "noise", tmp_path / "text.jsonl", "--language", "letters", "--overwrite"]
        assert run([*map(str, words), "--out", str(out)]) == 2
        assert f"{out}: is not a regular file" in capsys.readouterr().err
        assert stat.S_ISFIFO(out.stat().st_mode)
    assert (tmp_path / "link").is_symlink()


def test_a_file_that_is_no_json_lines_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "to be or not"}) + "\n")
    (tmp_path / "thesis.tex").write_text("\\documentclass{book}")
    words = ["data", "noise", tmp_path / "text.jsonl", "--language", "letters", "--overwrite"]
    assert run([*map(str, words), "--out", str(tmp_path / "thesis.tex")]) == 2
    assert "holds no JSON lines, so it is not replaced" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "\\documentclass{book}"
