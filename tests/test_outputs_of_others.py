"""No command replaces what it did not write, with --overwrite or without."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from nemotron import cli
from tests.support.commands import COMMANDS
from tests.support.tiny_run import MODEL

THEIRS = "\\documentclass{book}"
DOCUMENT = '{\n "begins": "as lines of JSON do, and holds none"\n}\n'
RL = {
    "stage": "rl",
    "name": "learner",
    "device": "cpu",
    "model": MODEL,
    "data": {"seq_len": 127},
    "schedule": {"kind": "constant", "peak": 1e-3, "total_steps": 1},
    "batch": {"global_tokens": 8 * 127, "micro_batch": 2},
    "rollout": {
        "environments": [{"name": "arith_chain"}, {"name": "pivot", "options": {"data": "rows"}}],
        "num_prompts_per_step": 4,
        "num_generations_per_prompt": 2,
        "max_new_tokens": 4,
    },
}
TRAIN = ["train", "tiny/smoke", "output=runs", "name=mine", "device=cpu", "evaluation.tokens=64",
         "schedule.total_steps=2", "schedule.warmup_steps=1", "schedule.decay_steps=1",
         "checkpoint.every_steps=1", "data.cache=cache"]  # fmt: skip


@dataclass(frozen=True)
class Output:
    """A command that writes, and the name, below the output, of a file that stands there."""

    words: str
    option: str = "--out"
    inside: str = ""
    """Empty: the output is the file itself."""
    content: str = THEIRS


FOLDER = "thesis.tex"
OUTPUTS = [
    Output("correct runs/mine --ar --in rows.jsonl"),
    Output("correct runs/mine --ar --in rows.jsonl", content=DOCUMENT),
    Output("data characters rows.jsonl"),
    Output("data codeswitch rows.jsonl --lexicon words.tsv --languages xx,en"),
    Output("data demo grammar", inside="text.jsonl"),
    Output("data inspect runs/mine/recipe.yaml --rows 0", "--plots", "shares.png"),
    Output("data noise rows.jsonl --language letters", content=DOCUMENT),
    Output("data pairs pairs.jsonl --workers 1", inside=FOLDER),
    Output("data prepare rows.jsonl --workers 1", inside=FOLDER),
    Output("data tokenizer rows.jsonl --vocab-size 400"),
    Output("evaluate runs/mine"),
    Output("evaluate runs/mine --suite mcqa@0", inside=FOLDER),
    Output("export runs/mine --no-check", inside=FOLDER),
    Output("generate runs/mine --prompts words.tsv"),
    Output("import exported", inside=FOLDER),
    Output("lm-eval runs/mine task"),
    Output("lm-eval runs/mine task", "--samples"),
    Output("merge runs/mine --last 2", inside=FOLDER),
    Output("quantize runs/mine --preset nvfp4 --rows 1 --no-check", inside=FOLDER),
    Output("recipe copy tiny/smoke", inside="tiny/smoke.yaml"),
    Output("report runs/mine"),
    Output("rl chats arith_chain --count 2"),
    Output("rl chats arith_chain --count 2", content=DOCUMENT),
    Output("rl evaluate rl.yaml --model runs/mine"),
    Output("rl evaluate rl.yaml --model runs/mine --budget 0 --budget 1", "--plot"),
    Output("rl pivots rl.yaml rows.jsonl --model runs/mine"),
]
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
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lines = [{"text": f"to be or not {number}"} for number in range(9)]
        Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        pair = {"target": "to be", "candidates": ["to bee", "too be"]}
        Path("pairs.jsonl").write_text((json.dumps(pair) + "\n") * 9)
        Path("words.tsv").write_text("be\tetre\n")
        with open("rl.yaml", "w") as file:
            YAML().dump(RL, file)
        assert cli.run(TRAIN) == 0
        assert cli.run(["export", "runs/mine", "--out", "exported", "--no-check"]) == 0
    return folder


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
