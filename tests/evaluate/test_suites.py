"""A really trained run on suites, by the command: the same again, continued, and compared."""

import json
import shutil
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from nemotron.cli import run

SHORT = ["schedule.total_steps=4", "schedule.warmup_steps=1", "schedule.decay_steps=1"]
SUITES = ["--suite", "arith_chain@1", "--suite", "mcqa_likelihood@1", "--suite", "text_to_sql"]
HOW = ["--tasks", "5", "--samples", "3", "--temperature", "1", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    words = ["train", "tiny/smoke", f"output={folder}", "name=trained", "evaluation.tokens=1024"]
    assert run([*words, *SHORT]) == 0
    return folder / "trained"


@pytest.fixture(scope="module")
def whole(trained: Path) -> Path:
    """The folder of an evaluation that nothing interrupted."""
    out = trained.parent / "whole"
    assert evaluate(trained, [*SUITES, *HOW, "--batch", "4"], out) == 0
    return out


def evaluate(model: Path, words: list[str], out: Path | None = None) -> int:
    place = ["--out", str(out)] if out else []
    return run(["evaluate", str(model), *words, *place, "--device", "cpu"])


def lines(folder: Path, name: str = "samples.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_answer_has_a_line_and_results_are_their_means(whole: Path):
    samples, results = lines(whole), json.loads((whole / "results.json").read_text())["results"]
    assert Counter(line["task"] for line in samples) == {
        "arith_chain@1": 15,
        "mcqa_likelihood@1": 5,
        "text_to_sql@0": 15,
    }
    assert [result["task"] for result in results] == list(Counter(s["task"] for s in samples))
    for result in results:
        own = [line for line in samples if line["task"] == result["task"]]
        assert result["reward"] == pytest.approx(np.mean([s["verdict"]["reward"] for s in own]))
        assert result["tasks"] == 5
    assert list(results[0]["pass_at"]) == ["1", "2", "3"]
    answers = {line["response"]["text"] for line in samples[:15]}
    assert len(answers) > 10  # drawn, not repeated


@pytest.mark.parametrize("kept", [0, 1, 7, 13, 19, 34])
def test_what_was_interrupted_goes_on_to_the_same_bits(
    trained: Path, whole: Path, tmp_path: Path, kept: int
):
    """A kill leaves so many answers and half a line."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "results.json").unlink()
    found = (out / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (out / "samples.jsonl").write_bytes(b"".join(found[:kept]) + found[kept][:30])
    assert evaluate(trained, [*SUITES, *HOW, "--batch", "4", "--resume"], out) == 0
    for name in ("samples.jsonl", "results.json", "samples.settings.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_another_setting_is_refused_by_the_name_of_its_option(
    trained: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    again = [*SUITES, *HOW, "--batch", "4", "--resume"]
    for option, value in (("--tasks", "3"), ("--stop", "x"), ("--seed", "9"), ("--budget", "2")):
        assert evaluate(trained, [*again, option, value], out) == 2
        assert f"{option} = " in (said := capsys.readouterr().err)
        assert value in said.partition(" is ")[0]


@pytest.mark.slow
def test_forged_answers_are_refused_and_cut_by_their_own_length(
    trained: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    found = (out / "samples.jsonl").read_bytes().splitlines(keepends=True)
    values = json.loads(found[0])
    values["verdict"]["reward"] = "much"
    (out / "samples.jsonl").write_text(json.dumps(values) + "\n")
    assert evaluate(trained, [*SUITES, *HOW, "--batch", "4", "--resume"], out) == 2
    assert "samples.jsonl, line 1: is not an answer" in capsys.readouterr().err
    assert json.loads((out / "samples.jsonl").read_text()) == values
    # another program may write the same JSON with more spaces; the last line is half a group
    spaced = [line.replace(b'": ', b'":   ') for line in found[:13]]
    (out / "samples.jsonl").write_bytes(b"".join(spaced))
    assert evaluate(trained, [*SUITES, *HOW, "--batch", "4", "--resume"], out) == 0
    assert lines(out) == lines(whole)


def test_answers_row_by_row_are_the_same_bits_for_every_batch(trained: Path, tmp_path: Path):
    asked = ["--suite", "arith_chain", *HOW, "--row-by-row"]
    for batch in ("1", "6"):
        assert evaluate(trained, [*asked, "--batch", batch], tmp_path / batch) == 0
    first, second = (tmp_path / batch / "samples.jsonl" for batch in ("1", "6"))
    assert first.read_bytes() == second.read_bytes()
    assert evaluate(trained, [*asked, "--seed", "1"], tmp_path / "other") == 0
    assert lines(tmp_path / "other")[0]["row"] != lines(tmp_path / "1")[0]["row"]


@pytest.mark.slow
def test_a_model_against_itself_changes_nothing_and_against_another_something(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["train", "tiny/smoke", f"output={tmp_path}", "name=other", "seed=7", *SHORT]) == 0
    asked = ["--suite", "mcqa_likelihood", "--tasks", "8", "evaluation.tokens=1024"]
    found = {}
    for other in (trained, tmp_path / "other"):
        out = tmp_path / f"against-{other.name}"
        assert evaluate(trained, [*asked, "--against", str(other)], out) == 0
        found[other.name] = json.loads((out / "results.json").read_text())["against"]
        assert len(lines(out, "reference.jsonl")) == 8
    assert found["trained"]["agreement"]["kl"] == 0
    assert found["trained"]["agreement"]["top1"] == 1
    assert found["trained"]["deltas"][0]["difference"] == {"mean": 0, "error": 0}
    assert found["other"]["agreement"]["kl"] > 1e-4
    pairs = zip(
        lines(tmp_path / "against-other"),
        lines(tmp_path / "against-other", "reference.jsonl"),
        strict=True,
    )
    differences = [a["verdict"]["reward"] - b["verdict"]["reward"] for a, b in pairs]
    assert found["other"]["deltas"][0]["difference"]["mean"] == pytest.approx(np.mean(differences))
    assert "KL 0.000000 nats a token  same likeliest token 100.00%" in capsys.readouterr().out


@pytest.mark.slow
def test_long_texts_give_a_heat_map_over_length_and_depth(trained: Path, tmp_path: Path):
    asked = ["--suite", "ruler", "--lengths", "256,320", "--depths", "0,1", "--tasks", "1"]
    assert evaluate(trained, [*asked, "--max-new-tokens", "2"], tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["ruler"]
    assert (found["lengths"], found["depths"]) == ([256, 320], [0.0, 1.0])
    assert found["needles"] == [[0.0, 0.0], [0.0, 0.0]]
    assert len(found["by_kind"]) == len(found["others"]) == 4
    drawing = ElementTree.parse(tmp_path / "out" / "ruler.svg").getroot()
    assert "256 tokens" in "".join(drawing.itertext())
    assert {line["row"]["kind"] for line in lines(tmp_path / "out")} > {"needle_single"}


def test_perplexity_is_that_of_held_out_text(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert evaluate(trained, ["--suite", "perplexity"], tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["perplexity"]
    [last] = [
        row
        for row in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
        if "validation/loss" in row
    ]
    assert found["validation/loss"] == last["validation/loss"]


def test_tasks_that_cannot_run_here_are_left_out_of_offline_by_name(
    trained: Path, capsys: pytest.CaptureFixture[str]
):
    assert evaluate(trained, ["--suite", "offline", "--tasks", "1", "--max-new-tokens", "1"]) == 0
    assert "tool_calc_db@0 left out: suite = tool_calc_db@0 offers tools" in capsys.readouterr().out


@pytest.mark.slow
def test_wrong_input_is_one_sentence_and_loses_nothing(
    trained: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    asked = ["--suite", "arithmetic"]
    other = [*SUITES, *HOW, "--batch", "4", "--resume", "--seed", "3"]
    cases = [
        (["--suite", "arithmetik"], None, "did you mean arithmetic?"),
        (["--suite", "arith_chain@hard"], None, "write arith_chain@1"),
        (["--suite", "arith_chain@"], None, "write arith_chain@1"),
        (["--suite", "mcqa@99"], None, "suite = mcqa@99 is above 4, the highest level"),
        (["--suite", "mcqa_likelihood@4.5"], None, "is above 4, the highest level"),
        (["--suite", "knowledge@1"], None, "only an environment has; write knowledge"),
        (["--suite", "ruler@1"], None, "only an environment has; write ruler"),
        (["--suite", "arith_chain@1+tools"], None, "leave out +tools"),
        (["--suite", "tools"], None, "need the chat format"),
        ([*asked, "--samples", "2"], None, "raise the temperature"),
        ([*asked, "--temperature", "-1"], None, "temperature = -1"),
        ([*asked, "--prompt", "latin"], None, "give auto, chat or text"),
        ([*asked, "--budget", "4"], None, "only the chat format"),
        ([*asked, "--resume"], None, "give --out FOLDER"),
        (["--resume"], None, "name them with --suite"),
        ([*asked, "--against", "nowhere"], None, "does not exist"),
        (["--suite", "ruler", "--lengths", "many"], None, "write such as 512,2048"),
        (["--suite", "ruler", "--lengths", "8"], None, "lengths = 8"),
        (["--suite", "ruler", "--depths", "2"], None, "depths = 2"),
        (asked, foreign, "exists already"),
        ([*asked, "--resume"], foreign, "is not the folder of an evaluation"),
        (asked, tmp_path / "no" / "folder", "does not exist"),
        (asked, whole, "continue it with --resume"),
        (other, whole, "seed = 3 is not 0"),
    ]
    for words, out, said in cases:
        capsys.readouterr()
        assert evaluate(trained, words, out) == 2, words
        [sentence] = capsys.readouterr().err.strip().splitlines()
        assert said in sentence, sentence
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    assert [path.name for path in foreign.iterdir()] == ["mine.txt"]
