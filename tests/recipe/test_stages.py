"""A recipe names its stage of training, which picks the class of its configuration."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from nemotron.cli import run
from nemotron.errors import Finding, UserError
from nemotron.recipe.load import load_recipe
from nemotron.recipe.show import schema
from nemotron.recipe.stages import STAGES, Stage
from nemotron.section import Section
from nemotron.train.config import PretrainConfig, RunConfig

SMOKE = str(Path(__file__).parents[2] / "recipes/tiny/smoke.yaml")


class RepairConfig(Section):
    """What is repaired."""

    rate: float = Field(0.5, ge=0)
    """Share of the rows that are repaired."""
    rows: int = Field(4, gt=0)
    """Rows that are looked at."""


class CorrectConfig(RunConfig):
    """A stage of the test's own."""

    stage: Literal["correct"] = "correct"
    """Kind of training."""
    repair: RepairConfig
    """What is repaired."""


def contradictions(config: CorrectConfig) -> Iterator[Finding]:
    if config.repair.rows > config.batch.global_tokens:
        yield Finding("repair.rows", "is over the tokens of a step.", config.repair.rows)


@pytest.fixture
def correct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second stage beside pre-training."""
    monkeypatch.setitem(STAGES, "correct", Stage(CorrectConfig, contradictions))


@pytest.fixture
def recipe(tmp_path: Path):
    """Write a recipe of that stage, with further lines."""

    def write(*lines: str, rate: str = "0.25") -> str:
        path = tmp_path / "correct.yaml"
        base = [f"extends: {SMOKE}", "stage: correct", "name: correct"]
        path.write_text("\n".join([*base, "repair:", f"  rate: {rate}", *lines]) + "\n")
        return str(path)

    return write


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def test_without_a_stage_a_recipe_is_one_of_pretraining():
    config = load_recipe(SMOKE).config
    assert isinstance(config, PretrainConfig)
    assert config.stage == "pretrain"


def test_an_unknown_stage_is_refused_with_the_known_ones(correct):
    assert refusal(SMOKE, "stage=tune") == (
        "command line: stage = tune is unknown; known are pretrain, sft, distill, dpo, rl, correct."
    )
    assert refusal(SMOKE, "stage=corect") == (
        "command line: stage = corect is unknown; known are pretrain, sft, distill, dpo, rl, "
        "correct; did you mean correct?"
    )
    assert "stage = [1] is unknown" in refusal(SMOKE, "stage=[1]")


@pytest.mark.usefixtures("correct")
def test_a_second_stage_is_loaded_shown_and_checked(recipe, capsys: pytest.CaptureFixture):
    path = recipe("  rows: 7")
    config = load_recipe(path).config
    assert isinstance(config, CorrectConfig)
    assert (config.repair.rate, config.repair.rows, config.batch.global_tokens) == (0.25, 7, 256)
    assert run(["recipe", "show", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    [rate] = [line for line in lines if line.strip().startswith("rate:")]
    assert rate.endswith("correct.yaml:5")
    assert not any(line.startswith("loss:") for line in lines)
    assert run(["recipe", "check", path]) == 0
    assert run(["recipe", "diff", SMOKE, path]) == 0
    assert 'stage: "pretrain" -> "correct"' in capsys.readouterr().out


@pytest.mark.usefixtures("correct")
def test_mistakes_are_explained_by_the_keys_and_rules_of_the_stage(recipe):
    assert "the nearest known one is `rate`" in refusal(recipe("  rat: 1"))
    assert ": rate is unknown; it belongs under `repair`" in refusal(recipe("rate: 1"))
    assert ": loss is unknown" in refusal(recipe("loss: {}"))
    assert "correct.yaml:5: repair.rate = -1 must be" in refusal(recipe(rate="-1"))
    assert "correct.yaml:6: repair.rows = 300 is over" in refusal(recipe("  rows: 300"))
    # rules of every stage
    idle = refusal(recipe("logging: {project: other}"))
    assert "logging.project has no effect because logging.trackers is empty" in idle


@pytest.mark.usefixtures("correct")
def test_a_command_for_pretraining_refuses_another_stage(recipe, capsys: pytest.CaptureFixture):
    assert run(["train", recipe(), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "correct.yaml:2: stage = correct can be read and checked, but nothing trains" in said
    assert run(["data", "plan", recipe()]) == 2
    said = capsys.readouterr().err
    assert "correct.yaml:2: stage = correct is not for this command, which takes" in said


@pytest.mark.usefixtures("correct")
def test_the_schema_has_the_keys_of_every_stage():
    document = json.loads(schema())
    assert document["properties"]["stage"]["enum"] == [
        "pretrain",
        "sft",
        "distill",
        "dpo",
        "rl",
        "correct",
    ]
    first, *_, second = document["allOf"]
    assert "required" not in first["if"]
    assert second["if"] == {"properties": {"stage": {"const": "correct"}}, "required": ["stage"]}
    sections = document["$defs"]
    for branch, own, foreign in ((first, "loss", "repair"), (second, "repair", "loss")):
        section = sections[branch["then"]["$ref"].rpartition("/")[2]]
        assert section["additionalProperties"] is False
        assert {own, "extends", "model", "schedule"} <= section["properties"].keys()
        assert foreign not in section["properties"]
