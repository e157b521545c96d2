"""What is wrong with a fine-tuning recipe or its conversations is one sentence."""

from pathlib import Path

import pytest

from nemotron.cli import run
from tests.support.conversations import ANSWER, QUESTION
from tests.support.fine_tuning import Workplace, write_rows
from tests.support.prepared import write_prepared

GOOD = {"messages": [QUESTION, ANSWER]}
MISTAKES = {
    "no turn of an assistant": (
        {"rows": [GOOD, {"messages": [QUESTION]}]},
        "messages has no assistant message; give at least one to train on. (1 bad rows so far, "
        "data.chat.max_bad_rows 0)",
    ),
    "no messages": ({"rows": [{"text": "A"}]}, "messages"),
    "nothing to learn": (
        {"rows": [{"messages": [QUESTION, {**ANSWER, "weight": 0}]}] * 3},
        "there is no document to train on (rows 3, unsupervised 3)",
    ),
    "no such file": (
        {"data": {"sources": [{"name": "a", "path": "/absent.jsonl"}]}},
        "data.sources: a: /absent.jsonl: does not exist",
    ),
    "plain text": ({"prepared": True}, "is text without turns of an assistant"),
    "no checkpoint": ({"init_from": "/absent"}, "/absent: does not exist"),
    "nothing to begin from": ({"init_from": None}, "init_from is absent"),
    "cut conversations": (
        {"data": {"packing": {"kind": "concatenate"}}},
        "data.packing would cut conversations",
    ),
    "part that is not there": ({"tune": {"freeze": ["jet"]}}, "tune.freeze.0 = jet"),
    "nothing left": (
        {
            "tune": {
                "freeze": [
                    *("embed", "mamba", "attention", "mlp", "router", "experts", "shared"),
                    *("latent", "head", "mtp"),
                ]
            }
        },
        "leaves nothing to train",
    ),
    "no conversation fits": ({"seq_len": 8}, "data.packing drops all"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    changes, said = MISTAKES[name]
    changes = dict(changes)
    if rows := changes.pop("rows", None):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        changes["data"] = {"sources": [{"name": "own", "path": str(path)}]}
    if changes.pop("prepared", False):
        path = write_prepared(["Some text. " * 40] * 9, tmp_path / "text")
        changes["data"] = {"sources": [{"name": "own", "path": str(path)}]}
    if length := changes.pop("seq_len", None):
        changes |= {"data": {"seq_len": length}, "batch": {"global_tokens": 4 * length}}
    recipe = workplace.recipe("bad", **changes)
    capsys.readouterr()
    assert run(["train", str(recipe)]) == 2
    sentence = capsys.readouterr().err.strip()
    assert said in sentence
    assert len(sentence.splitlines()) == 1
    assert not (workplace.runs / "bad" / "checkpoints").exists()


def test_unfit_rows_are_left_out_where_the_recipe_allows_it(
    workplace: Workplace, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {"messages": [QUESTION]}] * 12)
    data = {"sources": [{"name": "own", "path": str(path)}], "chat": {"max_bad_rows": 12}}
    assert workplace.train("allowed", "--stop-at", "1", data=data).is_dir()
