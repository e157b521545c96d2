"""What others wrote reaches a screen or a log as text, never as a command to the terminal."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from nemotron import cli
from nemotron.console import PrintableConsole
from nemotron.hf import selfcheck
from nemotron.plan.tables import Grid, show
from nemotron.run.screen import Screen
from tests.support.prepared import write_prepared

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # a run, its export and the export's check
CLEAR, SHOWN = "\x1b[2J\x9b2J", r"[2J\x9b2J"
"""What empties a terminal's window, in two ways, and how it is to be shown."""
RECIPE = """\
extends: {root}/recipes/tiny/smoke.yaml
name: mine
output: "{folder}/runs"
data:
  cache: "{folder}/cache"
  seq_len: 32
  sources: [{{name: "web\\e[2J\\x9b2J", path: "{folder}/web"}}]
batch: {{global_tokens: 64}}
schedule: {{total_steps: 2, warmup_steps: 1, decay_steps: 1}}
checkpoint: {{every_steps: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name is a command to a terminal, with a recipe, data and a trained run."""
    folder = tmp_path_factory.mktemp("printable") / f"of {CLEAR} others"
    texts = [f"a text {CLEAR} number {n} of many that are long enough" for n in range(60)]
    write_prepared(texts, folder / "web", validation_fraction=0.2)
    text = RECIPE.format(root=ROOT, folder=str(folder).replace(CLEAR, r"\e[2J\x9b2J"))
    (folder / "mine.yaml").write_text(text)
    assert cli.run(["train", str(folder / "mine.yaml")]) == 0
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert cli.run(["export", str(folder / "runs/mine"), "--no-check"]) == 0
        # what runs in a process of its own after an export
        assert selfcheck.main(folder / "runs/mine/export", folder / "runs/mine") == 0
    assert_shown(output.getvalue())
    return folder


def assert_shown(text: str) -> None:
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert SHOWN in text


def said(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    capsys.readouterr()
    assert cli.run(arguments) == code
    output = capsys.readouterr()
    return output.out + output.err


@pytest.mark.parametrize(
    "words",
    [
        ["recipe", "show", "{recipe}"],
        ["recipe", "check", "{recipe}"],
        ["recipe", "diff", "{recipe}", f"{ROOT}/recipes/tiny/smoke.yaml"],
        ["data", "plan", "{recipe}"],
        ["data", "inspect", "{recipe}"],
        ["data", "inspect", "{folder}/web"],
        ["train", "{recipe}", "--dry-run"],
        ["train", "{recipe}", "--resume"],
        ["import", "{folder}/runs/mine/export", "--out", "{folder}/imported"],
        ["report", "{folder}/runs/mine"],
        ["evaluate", "{folder}/runs/mine", "--out", "{folder}/loss.json"],
        ["merge", "{folder}/runs/mine", "--out", "{folder}/merged"],
        [
            "quantize",
            "{folder}/runs/mine",
            "--preset",
            "fp8",
            "--rows",
            "1",
            "--no-check",
            "--out",
            "{folder}/small",
        ],
        ["data", "prepare", "{recipe}", "--out", "{folder}/shards", "--workers", "1"],
        ["data", "demo", "grammar", "--number", "2", "--out", "{folder}/demo"],
        ["rl", "chats", "arith_chain", "--count", "1", "--out", "{folder}/chats.jsonl"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_no_command_prints_an_escape_sequence(
    words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
):
    given = {"folder": folder, "recipe": folder / "mine.yaml"}
    text = said([word.format(**given) for word in words], capsys)
    assert_shown(text)


def test_the_log_of_a_run_has_none(folder: Path):
    text = (folder / "runs/mine/log.txt").read_text()
    assert_shown(text)


def test_a_shown_recipe_reads_back_to_the_same_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    shown = said(["recipe", "show", str(folder / "mine.yaml")], capsys)
    (folder / "again.yaml").write_text(shown)
    again = said(["recipe", "diff", str(folder / "mine.yaml"), str(folder / "again.yaml")], capsys)
    assert again == ""


def test_a_model_of_an_unknown_kind_is_named_without_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(folder / "runs/mine/export", tmp_path / "export")
    path = tmp_path / "export/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": f"x{CLEAR}"}))
    text = said(["import", str(path.parent), "--out", str(tmp_path / "run")], capsys, 2)
    assert_shown(text)


def test_a_terminal_gets_generated_text_without_them_and_a_pipe_gets_it_as_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    words = ["generate", str(folder / "runs/mine"), "--prompt", f"a {CLEAR}", "--seed", "1"]
    words += ["--max-new-tokens", "2", "--device", "cpu"]
    assert f"a {CLEAR}" in said(words, capsys)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for more in ([], ["--no-stream"]):
        text = said(words + more, capsys)
        assert_shown(text)


def test_a_panel_and_tables_of_a_terminal_have_none(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen(stream := Terminal())
    screen.start(f"run {CLEAR}", 10)
    screen.info(f"event {CLEAR}")
    screen.close()
    console = PrintableConsole(file=stream, width=100, force_terminal=True)
    grids = [Grid(f"title {CLEAR}", [f"head {CLEAR}"], [[f"cell {CLEAR}"]], [f"note {CLEAR}"])]
    show([*grids, Grid(f"empty {CLEAR}", [], [])], console)
    text = stream.getvalue()
    assert CLEAR not in text
    for word in ("run", "event", "title", "head", "cell", "note", "empty"):
        assert rf"{word} \x1b{SHOWN}" in text, word
