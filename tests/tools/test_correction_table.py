"""The tool behind the figures of correction: its arithmetic, and what its arms differ in."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nemotron.cli import run
from nemotron.recipe.load import load_recipe
from nemotron.recipe.show import diff
from tests.support.pages import ROOT

DIFFERENT = {
    "masks": ("correct.mask_rate",),
    "candidates": ("data.sources", "model.correction"),
    "soft": ("correct.kind", "correct.first_steps"),
    "experts": ("data.language_of", "model.language_experts", "model.n_group"),
    "injection": ("data.sources",),
    "ways": (
        *("stage", "correct.", "data.chat.", "data.mask_correct", "data.sources", "tune."),
        *("evaluation.tokens", "phases"),
    ),
}
"""Where the recipes of a comparison differ, as beginnings of keys."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import correction_table

        return correction_table


@pytest.fixture(scope="module")
def arms(tool: ModuleType) -> ModuleType:
    return sys.modules["correction_arms"]


def test_an_effect_is_the_mean_of_paired_differences_and_its_standard_error(tool: ModuleType):
    found = tool.effect([1.0, 4.0, 2.0], [2.0, 7.0, 4.0])
    assert (found.without, found.with_) == (pytest.approx(7 / 3), pytest.approx(13 / 3))
    assert found.difference == pytest.approx(2)  # 1, 3 and 2
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(tool.effect([1.0], [2.0]).error)


def test_the_table_pairs_the_seeds_that_both_arms_have(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    cers = {("unmasked", 1): 0.5, ("unmasked", 2): 0.3, ("masked", 2): 0.2, ("masked", 1): 0.1}
    cers["unmasked", 3] = 0.9
    measures = {"correction_f0.5": 0.25, "sentences_worse": 150}
    lines = [
        json.dumps({"arm": arm, "seed": seed, "answer_cer": cer, **measures})
        for (arm, seed), cer in cers.items()
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("sys.argv", ["table", "--out", str(tmp_path), "--table"])
    tool.main()
    rows = [
        [cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.split("\n")
    ]
    found = {row[2]: row[3:7] for row in rows if len(row) > 6}
    assert found["CER"] == ["0.4000", "0.1500", "-0.2500 ± 0.1500", "2"]
    assert found["correction F0.5"] == ["0.2500", "0.2500", "+0.0000 ± 0.0000", "2"]


def test_every_arm_has_a_valid_recipe(tool: ModuleType, arms: ModuleType):
    for arm in arms.ARMS:
        assert run(["recipe", "check", *tool.settings(arm, 7)]) == 0, arm


def test_arms_of_a_comparison_differ_in_what_is_compared_alone(tool: ModuleType, arms: ModuleType):
    by_name = {arm.name: arm for arm in arms.ARMS}
    for each in arms.COMPARISONS:
        words = [tool.settings(by_name[name], 7) for name in (each.without, each.with_)]
        recipes = [load_recipe(Path(path), more) for path, *more in words]
        keys = {key for key, _, _ in diff(*recipes)} - {"name"}
        assert all(key.startswith(DIFFERENT.get(each.name, ())) for key in keys), (each.name, keys)
        assert bool(keys) == (each.without != each.with_)


def test_an_arm_follows_the_one_whose_weights_it_begins_with(arms: ModuleType):
    found = arms.arms_of([each for each in arms.COMPARISONS if each.name == "ways"])
    assert [arm.name for arm in found] == ["base", "one-pass", "written"]
