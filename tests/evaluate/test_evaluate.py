"""A really trained run, its export and its merge on held-out text, by the command."""

import json
import shutil
from pathlib import Path

import pytest

from nemotron.cli import run

SHORT = ["schedule.total_steps=4", "schedule.warmup_steps=1", "schedule.decay_steps=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    words = ["train", "tiny/smoke", f"output={folder}", "name=trained", "evaluation.tokens=1024"]
    assert run([*words, *SHORT]) == 0
    assert run(["export", str(folder / "trained"), "--no-check"]) == 0
    return folder / "trained"


def logged(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    [last] = [row for row in rows if "validation/loss" in row and row["step"] == 4]
    return {name: value for name, value in last.items() if name.startswith("validation")}


def evaluated(words: list[str], out: Path) -> dict[str, float]:
    assert run(["evaluate", *words, "--out", str(out), "--device", "cpu"]) == 0
    return json.loads(out.read_text())["metrics"]


def test_a_run_has_the_values_that_it_logged_when_it_ended(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = evaluated([str(trained)], tmp_path / "own.json")
    assert found == logged(trained)
    table = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:5]}
    assert list(rows) == ["code", "docs", "verse", "all"]
    assert float(rows["all"][0]) == pytest.approx(found["validation/loss"], abs=5e-5)
    assert float(rows["verse"][2]) == pytest.approx(
        found["validation/verse/bits_per_byte"], abs=5e-5
    )


def test_an_export_loses_what_its_rounding_costs(trained: Path, tmp_path: Path):
    words = [str(trained / "export"), "--recipe", str(trained / "recipe.yaml")]
    found, wanted = evaluated(words, tmp_path / "export.json"), logged(trained)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # weights in bfloat16 have 8 bits
        assert found[name] == pytest.approx(value, rel=4e-3), name
    assert found != wanted


def test_more_text_may_be_asked_for(trained: Path, tmp_path: Path):
    found = evaluated([str(trained), "evaluation.tokens=4096"], tmp_path / "more.json")
    assert found["validation/loss"] != logged(trained)["validation/loss"]


def test_wrong_input_is_one_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "foreign"
    shutil.copytree(trained / "export", folder)
    text = (folder / "tokenizer.json").read_text()
    assert "<|im_start|>" in text
    text = text.replace("<|im_start|>", "<|im_begin|>")
    (folder / "tokenizer.json").write_text(text)
    full = tmp_path / "full.json"
    full.write_text("{}")
    own = ["--recipe", str(trained / "recipe.yaml")]
    cases = [
        ([str(tmp_path / "none")], "does not exist"),
        ([str(trained / "export")], "give one: --recipe FILE"),
        ([str(folder), *own], "is not the tokenizer of"),
        ([str(trained), "--out", str(full)], "exists already"),
        ([str(trained), "--out", str(full / "x.json")], "lies below a file"),
        ([str(trained), "data.validation_fraction=0"], "holds nothing out"),
        ([str(trained), "evaluation.tokens=-1"], "evaluation.tokens = -1"),
        ([str(trained), "--device", "tpu"], "tpu"),
    ]
    for words, said in cases:
        capsys.readouterr()
        assert run(["evaluate", *words]) == 2, words
        [sentence] = capsys.readouterr().err.strip().splitlines()
        assert said in sentence
    assert full.read_text() == "{}"
