"""`precision: NAME` in a file and on the command line stands for its keys."""

from pathlib import Path

import pytest

from nemotron.errors import UserError
from nemotron.precision.policy import PRESETS
from nemotron.recipe.load import load_recipe

SMOKE = Path(__file__).parents[2] / "recipes/tiny/smoke.yaml"


def precision(path: Path, *words: str) -> tuple[str, str, int | None]:
    found = load_recipe(path, words).config.precision
    return found.compute, found.preset, found.observe_every_steps


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_name_is_the_section(tmp_path: Path, name: str):
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: {SMOKE}\nprecision: {name}\n")
    recipe = load_recipe(path)
    assert (recipe.config.precision.compute, recipe.config.precision.preset) == ("bf16", name)
    assert recipe.places["precision", "preset"] == f"{path}:2"
    assert precision(SMOKE, f"precision={name}") == ("bf16", name, None)


def test_keys_are_laid_over_a_name_and_a_name_over_keys(tmp_path: Path):
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text(f"extends: {SMOKE}\nprecision: nvfp4\n")
    own.write_text("extends: base.yaml\nprecision: {observe_every_steps: 5}\n")
    assert precision(own) == ("bf16", "nvfp4", 5)
    assert precision(own, "precision=mxfp8") == ("bf16", "mxfp8", 5)
    assert precision(own, "precision.preset=mxfp8") == ("bf16", "mxfp8", 5)
    assert precision(SMOKE, "precision=fp32") == ("fp32", "bf16", None)


def test_a_name_that_is_none_is_told_with_its_place(tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: {SMOKE}\nprecision: int3\n")
    with pytest.raises(UserError, match=f"{path}:2: precision = int3 must be one of fp32, bf16"):
        load_recipe(path)
