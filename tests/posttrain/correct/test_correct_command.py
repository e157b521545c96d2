"""`nemotron correct`: a file of candidates in, a file of answers out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.cli import run
from nemotron.hf.selfcheck import main as selfcheck_main
from nemotron.hf.source import open_checkpoint
from nemotron.loading import load
from tests.support.fine_tuning import write_recipe, write_rows
from tests.support.pairs import LETTERS, MODEL, PairPlace, tokenizer

LINES = [
    {"id": "one", "candidates": ["abcd", "abbd"], "target": "abcd"},
    {"id": "two", "candidates": ["ponm"]},
    {"id": "three", "candidates": ["", "aceg", "bdf"]},
]


@pytest.fixture(scope="module")
def soft(place: PairPlace) -> Path:
    model = {**MODEL, "correction": {"candidates": 2}}
    recipe = place.recipe("soft", model=model, correct={"kind": "soft"})
    assert run(["train", str(recipe)]) == 0
    return place.runs / "soft"


def corrected(model: Path, lines: Sequence[Any], out: Path, *more: str) -> list[dict[str, Any]]:
    source = write_rows(out.with_name("in.jsonl"), list(lines))
    assert run(["correct", str(model), "--in", str(source), "--out", str(out), *more]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_each_line_gets_an_answer_and_keeps_its_fields(
    soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    found = corrected(soft, LINES, tmp_path / "out.jsonl")
    assert [
        {k: v for k, v in row.items() if k not in ("answer", "selected")} for row in found
    ] == LINES
    assert all(set(row["answer"]) <= set(LETTERS) for row in found)
    said = capsys.readouterr().err
    assert "3 lines corrected" in said
    assert "1 had too few candidates: the first was repeated" in said


def test_the_threshold_of_the_run_is_kept_beside_it_and_can_be_given(
    soft: Path, tmp_path: Path
) -> None:
    kept = json.loads((soft / "threshold.json").read_text())["threshold"]
    own = corrected(soft, LINES, tmp_path / "own.jsonl")
    given = corrected(soft, LINES, tmp_path / "given.jsonl", "--threshold", str(kept))
    never = corrected(soft, LINES, tmp_path / "never.jsonl", "--threshold", "-1e9")
    assert own == given
    assert all(row["answer"] in row["candidates"] for row in never if row["id"] != "three")


def test_scores_of_the_candidates_weigh_in_the_choice(place: PairPlace, tmp_path: Path) -> None:
    model = {**MODEL, "correction": {"candidates": 2}}
    options = {"kind": "soft", "acoustic_weight": 100.0, "threshold": -1e6}
    recipe = place.recipe("scored", model=model, correct=options, schedule={"total_steps": 1})
    assert run(["train", str(recipe)]) == 0
    chosen = []
    for better in (0, 1):
        scores = [[0.0 if k == better else -9.0] * 4 for k in (0, 1)]
        line = {"candidates": ["abcd", "abbd"], "scores": scores}
        out = tmp_path / f"{better}.jsonl"
        chosen += [row["answer"] for row in corrected(place.runs / "scored", [line], out)]
    assert chosen == ["abcd", "abbd"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 "),
        ({"target": "abc"}, "line 2 has no list of candidates"),
        ({"candidates": []}, "line 2 has no list of candidates"),
        ({"candidates": "abc"}, "line 2 has no list of candidates"),
        ({"candidates": ["abc", 7]}, "line 2 has a candidate that is not text"),
        ({"candidates": ["", ""]}, "line 2 has only empty candidates"),
        ({"candidates": ["abc"], "scores": [1, 2]}, "not a list of numbers for each candidate"),
        ({"candidates": ["abc"], "scores": [[1.0, 2.0]]}, "line 2: has 2 scores for 3 tokens"),
    ],
)
def test_an_unreadable_line_is_one_sentence(
    soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture, line: Any, said: str
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    source.write_text(json.dumps(LINES[0]) + "\n" + text + "\n")
    capsys.readouterr()
    command = ["correct", str(soft), "--in", str(source), "--out", str(out)]
    assert run(command) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_unreadable_lines_can_be_left_out_and_are_named(
    soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = [LINES[0], {"candidates": []}, LINES[1]]
    found = corrected(soft, lines, tmp_path / "out.jsonl", "--max-bad-rows", "1")
    assert [row["id"] for row in found] == ["one", "two"]
    assert "left out: " in capsys.readouterr().err


def test_what_is_no_run_of_the_stage_and_a_file_that_is_there_are_refused(
    soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = write_rows(tmp_path / "in.jsonl", LINES)
    capsys.readouterr()
    out = tmp_path / "out.jsonl"
    more = ["--in", str(source), "--out", str(out)]
    assert run(["correct", str(tmp_path), *more]) == 2
    assert "is not a run of stage: correct" in capsys.readouterr().err
    out.write_text("mine")
    assert run(["correct", str(soft), *more]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(["correct", str(soft), *more, "--overwrite"]) == 2
    assert "holds no JSON lines, so it is not replaced" in capsys.readouterr().err
    assert run(["correct", str(soft), "--in", str(source), "--out", str(source)]) == 2
    assert "is an input" in capsys.readouterr().err
    assert out.read_text() == "mine"
    out.write_text("{}\n")
    assert run(["correct", str(soft), *more, "--overwrite"]) == 0


def test_an_unknown_language_is_refused(
    soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = write_rows(tmp_path / "in.jsonl", LINES)
    more = ["--in", str(source), "--out", str(tmp_path / "out.jsonl"), "--language", "xx"]
    capsys.readouterr()
    assert run(["correct", str(soft), *more]) == 2
    assert "--language = xx is unknown" in capsys.readouterr().err


def test_answers_can_be_scored_with_their_time(
    soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = [{"id": str(n), "candidates": ["abcd", "abbd"], "target": "abcd"} for n in range(3)]
    found = corrected(soft, lines, tmp_path / "out.jsonl", "--timed")
    assert all(row["ms"] > 0 for row in found)
    capsys.readouterr()
    references = str(tmp_path / "in.jsonl")
    assert run(["score", str(tmp_path / "out.jsonl"), "--references", references]) == 0
    assert "selected" in capsys.readouterr().out
    assert "judged" not in found[0]
    source = str(tmp_path / "in.jsonl")
    judged = str(tmp_path / "judged.jsonl")
    assert run(["correct", str(soft), "--in", source, "--out", judged, "--judged", "--timed"]) == 0
    rows = [json.loads(line) for line in Path(judged).read_text().splitlines()]
    assert all("".join(token for token, _ in row["judged"]) == row["selected"] for row in rows)
    other = tmp_path / "other.jsonl"
    rows = [{"id": row["id"], "answer": "abcd", "ms": 1e6} for row in found]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["score", str(tmp_path / "out.jsonl"), "--references", references]
    assert run([*words, "--against", str(other)]) == 0
    beside = capsys.readouterr().out.split("out.jsonl", 1)[1]
    assert "other.jsonl" in beside
    [cer] = [line.split() for line in beside.splitlines() if line.startswith("answer_cer")]
    assert cer[2] == "0"
    assert "out.jsonl takes 0.000 of the time of other.jsonl" in beside
    figures = str(tmp_path / "figures")
    words[1] = judged
    assert run([*words, "--against", str(other), "--figures", figures]) == 0
    drawn = {path.name: path.read_text() for path in Path(figures).iterdir()}
    assert {"candidates.svg", "latency.svg"} <= drawn.keys()
    assert all("</svg>" in svg for svg in drawn.values())
    assert "other.jsonl" in drawn["latency.svg"]
    capsys.readouterr()
    assert run([*words, "--against", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against"]["median_ms"] == 1e6


def test_a_model_that_answers_chats_writes_token_by_token(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """An untrained one: its answers do not end, so that the first candidate stays."""
    values = {
        "name": "untrained",
        "output": str(tmp_path / "runs"),
        "device": "cpu",
        "model": {**MODEL, "vocab_size": 4096},
        "data": {"sources": ["verse"], "seq_len": 32, "cache": str(tmp_path / "cache")},
        "batch": {"global_tokens": 64},
        "schedule": {"peak": 1e-3, "total_steps": 1, "kind": "constant"},
        "evaluation": {"tokens": 64},
    }
    assert run(["train", str(write_recipe(tmp_path / "one.yaml", values))]) == 0
    capsys.readouterr()
    found = corrected(tmp_path / "runs/untrained", LINES[:2], tmp_path / "out.jsonl", "--ar")
    assert [row["answer"] for row in found] == ["abcd", "ponm"]
    said = capsys.readouterr().err
    assert "2 answers were empty or too long: the first candidate stays" in said
    assert "1 had too many candidates" in said


def test_of_a_model_of_several_candidates_only_the_trunk_is_exported(
    soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    out = tmp_path / "export"
    assert run(["export", str(soft), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "has no counterpart in transformers; nemotron export --trunk-only" in said
    assert tokenizer().vocab_size < MODEL["vocab_size"]
    assert run(["export", str(soft), "--out", str(out), "--trunk-only", "--no-check"]) == 0
    whole, trunk = load(soft), load(out)
    assert trunk.config.num_candidates == 1
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        # candidates that are all alike; weights on disk are bfloat16
        expected, found = (model.logits(model(ids)) for model in (whole, trunk))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    checkpoint = open_checkpoint(soft).info.folder
    assert selfcheck_main(out, checkpoint) == 0
