"""Looking at a correction recipe before it runs: its rows, and its cost."""

import pytest

from nemotron.cli import run
from tests.support.pairs import PairPlace


def test_rows_are_shown_with_their_answers(
    place: PairPlace, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = place.recipe("shown", correct={"kind": "soft", "mask_rate": 0})
    capsys.readouterr()
    assert run(["data", "inspect", str(recipe), "--rows", "1", "--step", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "pairs: 300 pairs of 2 candidates to train on, 40 held out"
    at = said.index("step 1 row 0:")
    reads = said[at + 1].split()[1]
    assert reads.startswith("<s>")
    first, second, slots = reads.removeprefix("<s>").removesuffix("</s>").split("<sep>")
    assert first == second
    kept = said[at + 2].split()
    assert kept[0] == "answers"
    assert set(kept[1]) <= set(slots)
    runs = [line.split() for line in said[at:] if line.startswith("  run")]
    assert all(int(words[-2]) >= 3 for words in runs)


def test_the_cost_is_predicted_and_axes_that_cannot_be_shared_are_named(
    place: PairPlace, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {}
    for kind in ("tag", "soft"):
        recipe = place.recipe(f"cost-{kind}", correct={"kind": kind}, batch={"micro_batch": 1})
        words = ["plan", str(recipe), "--hardware", "cpu", "--gpus", "2", "--json", "--search"]
        capsys.readouterr()
        assert run(words) == 0
        shared[kind] = capsys.readouterr().out.count("parallel.")
    assert shared["tag"] > shared["soft"] == 0
