"""The command line: help that is true, exit codes, what each command hands on."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import nemotron
from nemotron.cli import run
from tests.support.commands import COMMANDS

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes/tiny/smoke.yaml")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


def spoken(words: Sequence[str]) -> str:
    return " ".join(words)


def test_these_are_the_commands():
    assert set(map(spoken, COMMANDS)) == {
        "train",
        "recipe show",
        "recipe check",
        "recipe diff",
        "recipe list",
        "recipe copy",
        "recipe schema",
        "rl chats",
        "rl evaluate",
        "rl pivots",
        "rl reverify",
        "data prepare",
        "data tokenizer",
        "score",
        "correct",
        "lm-eval",
        "data demo",
        "data codeswitch",
        "data characters",
        "data noise",
        "data pairs",
        "data inspect",
        "data plan",
        "checkpoint convert",
        "doctor",
        "plan",
        "generate",
        "report",
        "runs",
        "compare",
        "serve",
        "chat",
        "check-parity",
        "export",
        "import",
        "merge",
        "quantize",
        "evaluate",
    }


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert run(["--help"]) == 0
    top = capsys.readouterr().out
    for words in COMMANDS:
        assert re.search(rf"^\W*{words[0]}\s", top, re.MULTILINE)
        if len(words) > 1:
            assert run([words[0], "--help"]) == 0
            group = capsys.readouterr().out
            assert re.search(rf"^\W*{words[1]}\s", group, re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS, ids=spoken)
def test_every_command_and_option_is_explained(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    assert run([*words, "--help"]) == 0
    answer = capsys.readouterr().out
    command = COMMANDS[words]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), parameter.name
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in answer


@pytest.mark.parametrize("words", COMMANDS, ids=spoken)
def test_the_example_of_every_command_is_understood(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    command = COMMANDS[words]
    label, _, example = command.epilog.partition(": nemotron ")
    assert label == "Example"
    arguments = shlex.split(example.partition(" > ")[0])
    assert tuple(arguments[: len(words)]) == words
    # parses as the command line would, and runs nothing
    given = command.make_context(words[-1], arguments[len(words) :]).params
    monkeypatch.chdir(ROOT)
    for key in {"recipe", "first", "second"} & given.keys():
        assert given[key] is None or Path(given[key]).is_file()


def test_the_module_runs_as_a_program():
    done = python("-m", "nemotron", "--version")
    assert (done.returncode, done.stdout) == (0, f"nemotron {nemotron.__version__}\n")
    assert done.stderr == ""


def test_a_mistake_ends_the_program_with_two_and_one_line():
    done = python("-m", "nemotron", "recipe", "check", RECIPE, "seed=many")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nemotron: command line: seed = many must be a whole number.\n"


@pytest.mark.parametrize("words", [[], ["recipe"]], ids=spoken)
def test_no_command_shows_the_help_and_nothing_else(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert run(words) == 2
    answer = capsys.readouterr()
    assert answer.out + answer.err
    assert run([*words, "--help"]) == 0
    assert capsys.readouterr().out.strip() == (answer.out + answer.err).strip()


# more than a buffer, so that the command meets the closed pipe, and less, so that the end does
@pytest.mark.parametrize(
    "words", [["recipe", "schema"], ["recipe", "check", RECIPE]], ids=["more", "less"]
)
def test_a_reader_that_has_left_is_no_error(words: list[str]):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "nemotron", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_control_characters_of_what_was_typed_are_shown_not_sent(
    capsys: pytest.CaptureFixture[str],
):
    assert run(["recipe", "check", "\x1b[31mred.yaml"]) == 2
    answer = capsys.readouterr().err
    assert "\x1b" not in answer
    assert r"\x1b[31mred.yaml" in answer


def test_a_question_about_a_command_ends_with_one_mark(capsys: pytest.CaptureFixture[str]):
    assert run(["traim"]) == 2
    assert "Did you mean 'train'? See " in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_says_what_would_run_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert run(["train", RECIPE, "--dry-run"]) == 0
    answer = capsys.readouterr().out
    assert "6 steps, 1,536 tokens" in answer
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_ends_with_130(monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nemotron.recipe.load.load_recipe", interrupted)
    assert run(["recipe", "check", RECIPE]) == 130
