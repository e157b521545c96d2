"""No command replaces what it did not write, with --overwrite or without."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemotron import cli
from tests.support.commands import COMMANDS
from tests.support.outputs import OUTPUTS, Output, make_world

ELSEWHERE = {
    ("checkpoint", "convert"): "tests/checkpoint/test_convert.py",
    ("rl", "reverify"): "tests/posttrain/test_rl_commands.py",
}
"""Commands whose inputs take more to make, and where they are tested."""
WRITES = {"--out", "--plot", "--plots", "--samples"}


def test_every_command_that_writes_is_here():
    known = {(words, output.option) for output in OUTPUTS for words in _words(output)}
    for words, command in COMMANDS.items():
        for option in WRITES & {name for each in command.params for name in each.opts}:
            if option == "--samples" and words != ("lm-eval",):
                continue  # a number
            assert words in ELSEWHERE or (words, option) in known, (words, option)


def _words(output: Output) -> Sequence[tuple[str, ...]]:
    first, second, *_ = output.words.split()
    return [words for words in ((first,), (first, second)) if words in COMMANDS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def tree(folder: Path) -> dict[str, str]:
    """Return what a folder holds but caches."""
    return {
        str(path): path.read_bytes().hex() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if "cache" not in path.parts
    }


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: f"{o.words.split(' ')[:2]} {o.option}")
def test_what_others_wrote_stays(
    output: Output, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    if output.words.startswith("lm-eval") and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    monkeypatch.chdir(world)
    out = Path("taken", str(OUTPUTS.index(output)))
    file = out / output.inside if output.inside else out
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(output.content)
    words = [*output.words.split(), output.option, str(out)]
    can_overwrite = any("--overwrite" in _options(words) for words in _words(output))
    before = tree(world)
    assert cli.run([*words, "--overwrite"] if can_overwrite else words) == 2
    said = capsys.readouterr().err
    assert str(out) in said
    assert said.count("\n") == 1
    assert tree(world) == before


def _options(words: tuple[str, ...]) -> set[str]:
    return {name for each in COMMANDS[words].params for name in each.opts}


KINDS = {
    "data prepare": "data prepare rows.jsonl --workers 1 --hold-out 0",
    "data pairs": "data pairs pairs.jsonl --workers 1 --hold-out 0",
    "export": "export runs/mine --no-check",
    "import": "import exported",
    "merge": "merge runs/mine --last 2",
    "quantize": "quantize runs/mine --preset fp8 --rows 1 --no-check",
}


@pytest.mark.slow
def test_no_command_replaces_the_folder_of_another(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(world)
    assert set(KINDS) == {" ".join(w) for w in COMMANDS if w and _replaces_folders(w)}
    for name, words in KINDS.items():
        assert cli.run([*words.split(), "--out", f"by/{name}"]) == 0
    before = tree(world)
    for name in KINDS:
        for other, words in KINDS.items():
            if other != name:
                capsys.readouterr()
                assert cli.run([*words.split(), "--out", f"by/{name}", "--overwrite"]) == 2
                said = capsys.readouterr().err
                assert said == (
                    f"nemotron: by/{name}: has no .nemotron.json of nemotron {other}, so it is "
                    "not replaced; choose another folder, or remove it yourself.\n"
                )
    assert tree(world) == before


def _replaces_folders(words: tuple[str, ...]) -> bool:
    return any("Replace the folder" in (each.help or "") for each in COMMANDS[words].params
               if "--overwrite" in each.opts)  # fmt: skip
