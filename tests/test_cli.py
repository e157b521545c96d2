import re
import subprocess
import sys

import pytest

import nemotron
from nemotron.cli import run

COMMANDS = ["train", "recipe", "doctor", "generate", "export", "import"]


def test_every_command_is_listed_with_one_line(capsys: pytest.CaptureFixture):
    assert run(["--help"]) == 0
    output = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"{command}\s+\w+", output), command


@pytest.mark.parametrize("command", [*COMMANDS, "recipe show", "recipe check", "recipe diff"])
def test_every_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture):
    assert run([*command.split(), "--help"]) == 0
    output = capsys.readouterr().out
    assert "Usage" in output
    if command != "recipe":
        assert "Example: nemotron" in output


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "nemotron", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert nemotron.__version__ in done.stdout


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture):
    assert run([]) in (0, 2)
    captured = capsys.readouterr()
    assert "train" in captured.out + captured.err


def test_output_into_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m nemotron recipe schema | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{"
    assert not done.stderr
