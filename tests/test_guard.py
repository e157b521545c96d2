"""What is left over: errors that nothing handles, streams that cannot be written, Ctrl-C early."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron import exit_codes
from nemotron.cli import run
from nemotron.terminal import one_line, printable
from tests.support import quick_python

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes/tiny/smoke.yaml")
NEMOTRON = f"{sys.executable} -m nemotron"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def test_a_fault_of_the_program_is_one_sentence_with_a_file_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SOME_TOKEN", "canary-0123456789")

    def fail(*_: object) -> None:
        raise KeyError("step\x1b[2J")

    monkeypatch.setattr("nemotron.recipe.load.load_recipe", fail)
    assert run(["recipe", "check", RECIPE, "name=canary-0123456789"]) == exit_codes.INTERNAL_ERROR
    [report] = tmp_path.iterdir()
    answer = capsys.readouterr()
    assert answer.out == ""
    [line] = answer.err.splitlines()
    assert line.startswith("nemotron: internal error: KeyError: 'step")
    assert line.endswith(f"please report it with the file {report}.")
    assert "\x1b" not in line
    text = report.read_text()
    assert "Traceback (most recent call last)" in text
    assert "recipe_check" in text
    assert "canary" not in text


def test_a_panic_of_a_library_in_rust_is_no_bare_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class PanicException(BaseException):
        """As pyo3 makes them."""

    def fail(*_: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("nemotron.recipe.load.load_recipe", fail)
    assert run(["recipe", "check", RECIPE]) == exit_codes.INTERNAL_ERROR
    assert "PanicException: index out of bounds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(28, "No space left on device", "/data/x.bin"),
            "/data/x.bin: No space left on device; make room there",
        ),
        (MemoryError("cannot allocate 8 GiB"), "out of memory (cannot allocate 8 GiB)"),
    ],
)
def test_what_the_machine_refuses_is_no_fault_of_the_program(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("nemotron.recipe.load.load_recipe", fail)
    assert run(["recipe", "check", RECIPE]) == exit_codes.FAILED
    answer = capsys.readouterr().err
    assert words in answer
    assert "internal" not in answer


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "PATH", "--prompt", "x"],
        ["import", "PATH", "--out", "out"],
        ["data", "inspect", "PATH"],
        ["checkpoint", "convert", "PATH"],
        ["data", "prepare", "rows.jsonl", "--out", "PATH"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("path", ["a" * 300, "loop"], ids=["long", "loop"])
def test_a_path_that_is_too_long_or_leads_in_a_circle_is_a_mistake(
    words: list[str], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    code = run([word.replace("PATH", path) for word in words])
    assert code == exit_codes.WRONG_INPUT, capsys.readouterr().err
    assert not Path("out").exists()


def test_debug_shows_the_traceback_of_a_mistake_before_its_sentence(
    capsys: pytest.CaptureFixture[str],
):
    assert run(["recipe", "check", RECIPE, "seed=many", "--debug"]) == exit_codes.WRONG_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "nemotron: command line: seed = many must be a whole number."
    assert any("load_recipe" in line for line in lines[:-1])


def test_every_command_has_the_option_debug(capsys: pytest.CaptureFixture[str]):
    for words in (["train"], ["recipe", "list"], ["data", "plan"], ["checkpoint", "convert"]):
        assert run([*words, "--help"]) == 0
        assert "--debug" in capsys.readouterr().out, words


def test_help_and_the_page_name_every_exit_code(capsys: pytest.CaptureFixture[str]):
    assert run(["--help"]) == 0
    spoken = " ".join(capsys.readouterr().out.split())
    page = (ROOT / "docs/commands.md").read_text()
    for code, meaning in exit_codes.MEANINGS.items():
        assert f"{code} {meaning}" in spoken
        assert f"| {code} | {meaning}" in page
    rows = re.findall(r"^\| (\d+) \|", page, re.MULTILINE)
    assert [int(row) for row in rows] == list(exit_codes.MEANINGS)


# (what becomes of the streams, exit code, words on the streams that are left)
STREAMS = [
    (f"recipe check {RECIPE} >&-", 0, ""),
    (f"recipe check {RECIPE} >/dev/full", 1, "standard output"),
    (f"recipe check {RECIPE} seed=many 2>&-", 2, ""),
    (f"recipe check {RECIPE} seed=many 2>/dev/full", 2, ""),
    (f"recipe check {RECIPE} seed=many 0<&- >&- 2>&-", 2, ""),
]


@pytest.mark.parametrize(("line", "code", "words"), STREAMS, ids=range(len(STREAMS)))
def test_streams_that_cannot_be_written_do_not_change_the_exit_code(
    line: str, code: int, words: str
):
    done = shell(f"{NEMOTRON} {line}")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_output_of_few_letters_gets_escapes_instead_of_an_error(tmp_path: Path):
    recipe = tmp_path / "café.yaml"
    recipe.write_text(f"extends: {RECIPE}\n")
    done = shell(f"{NEMOTRON} recipe check {recipe}", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"caf\xe9.yaml: valid" in done.stdout


def test_no_file_is_opened_as_a_standard_descriptor():
    code = (
        "from nemotron.terminal import open_streams; open_streams(); import os;"
        "file = open('/dev/zero');"
        "assert file.fileno() > 2;"
        "print(os.readlink('/proc/self/fd/2'))"
    )
    done = shell(f'{sys.executable} -c "{code}" 0<&- 2>&-')
    assert (done.returncode, done.stdout) == (0, f"{os.devnull}\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("most", "words", "code"),
    [
        (5, f"train {RECIPE} output=OUT --dry-run", exit_codes.FAILED),
        (6, "data prepare README.md --out OUT/text --workers 1", exit_codes.FAILED),
    ],
    ids=["train", "prepare"],
)
def test_few_open_files_are_a_sentence(most: int, words: str, code: int, tmp_path: Path):
    line = f"ulimit -n {most}; exec {NEMOTRON} {words.replace('OUT', str(tmp_path))}"
    done = shell(line)
    [said] = done.stderr.splitlines()
    assert (done.returncode, "Too many open files" in said) == (code, True), said


def test_ctrl_c_while_libraries_load_ends_at_once_and_in_silence(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "nemotron", "train", RECIPE, f"output={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    while "libtorch_python" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)
    assert process.returncode == exit_codes.INTERRUPTED
    assert said == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_what_a_terminal_would_obey_is_shown():
    hostile = "a\x1b]0;title\x07b\x9b2Jc\u202ed\re\udc80"
    assert printable(hostile) == r"a\x1b]0;title\x07b\x9b2Jc\u202ed\re\udc80"
    assert printable("日本\u3000\u00a0👩‍🔬\tx\n") == "日本\u3000\u00a0👩‍🔬\tx\n"
    assert one_line("a\nb\t") == r"a\nb\t"


@pytest.mark.distributed
def test_under_torchrun_a_mistake_is_said_once_and_closes_the_report(tmp_path: Path):
    torchrun = "python -m torch.distributed.run --standalone --nproc-per-node 2"
    done = shell(
        f"{torchrun} -m nemotron train {RECIPE} parallel.tp=3 output={tmp_path}",
        **quick_python.environment(),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 1
    spoken = [line for line in done.stderr.splitlines() if line.startswith("nemotron")]
    assert [line for line in spoken if "parallel" in line] == [spoken[0]]
    sentence = spoken[0].removeprefix("nemotron: ")
    assert f"traceback : {sentence}" in done.stderr.partition("Root Cause")[2]
