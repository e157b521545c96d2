"""`ops: NAME` in a file and on the command line stands for its keys."""

from pathlib import Path

import pytest

from nemotron.errors import UserError
from nemotron.ops.apply import ALL, GENERATION
from nemotron.ops.config import PRESETS, OpsConfig
from nemotron.recipe.load import load_recipe

SMOKE = Path(__file__).parents[2] / "recipes/tiny/smoke.yaml"


def ops(path: Path, *words: str) -> dict[str, str]:
    found = load_recipe(path, words).config.ops.model_dump()
    return {name: backend for name, backend in found.items() if backend != "auto"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_name_is_the_section(tmp_path: Path, name: str):
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: {SMOKE}\nops: {name}\n")
    assert load_recipe(path).config.ops == OpsConfig(**PRESETS[name])
    assert load_recipe(path).places["ops", "ssd"] == f"{path}:2"
    assert ops(SMOKE, f"ops={name}") == ops(path)


@pytest.mark.parametrize("name", ["numba", "numba_int16"])
def test_a_preset_names_every_operation_of_training_that_has_the_backend(name: str):
    having = {
        operation.name
        for operation in ALL
        if operation.name not in GENERATION
        and any(backend.name == name for backend in operation.backends)
    }
    assert {o for o, backend in PRESETS[name].items() if backend == name} == having
    # what has no integers has the other kernels
    assert PRESETS[name].keys() == PRESETS["numba"].keys()


def test_keys_are_laid_over_a_name_and_a_name_over_keys(tmp_path: Path):
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text(f"extends: {SMOKE}\nops: numba\n")
    own.write_text("extends: base.yaml\nops: {linear: auto, token_copies: reference}\n")
    rest = {name: backend for name, backend in PRESETS["numba"].items() if name != "linear"}
    assert ops(own) == rest | {"token_copies": "reference"}
    assert ops(own, "ops=numba_int16")["linear"] == "numba_int16"
    assert ops(own, "ops=numba_int16")["token_copies"] == "reference"
    assert ops(SMOKE, "ops=numba", "ops.ssd=chunked")["ssd"] == "chunked"
    assert ops(own, "ops=auto") == {}


def test_a_name_that_is_none_is_told_with_its_place(tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: {SMOKE}\nops: numbba\n")
    with pytest.raises(UserError, match=f"{path}:2: ops = numbba must be one of auto, numba or"):
        load_recipe(path)
