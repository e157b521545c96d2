"""Recipes for a number of GPUs: their layouts are legal, fit, and as published."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemotron.cli import run
from nemotron.parallel.dims import ParallelDims, resolve_dims
from nemotron.recipe.load import load_recipe
from nemotron.recipe.read import read_yaml
from nemotron.train.config import PretrainConfig
from nemotron.train.layout import findings
from nemotron.train.schedule import plan_training

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
LAYOUTS = sorted(RECIPES.glob("*/layouts/*.yaml"))
LAID_OUT = sorted(p for p in RECIPES.glob("*/*.yaml") if re.search(r"_\d+x\w+$", p.stem))
# a layout for 64 B200 is one for 64 GB200, too
SYSTEMS = {"h100": ["h100"], "b200": ["b200", "gb200"], "gb200": ["gb200"]}


def gpus_of(path: Path) -> tuple[int, str]:
    """Return the number and the kind of GPUs that a file's name ends in."""
    match = re.search(r"(\d+)x(\w+)$", path.stem)
    assert match is not None, path
    return int(match[1]), match[2]


RUNS = [(path, system) for path in LAID_OUT for system in SYSTEMS[gpus_of(path)[1]]]


def name(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def run_name(value: Any) -> str:
    return name(value) if isinstance(value, Path) else str(value)


def dims_of(recipe: str) -> ParallelDims:
    path = RECIPES / recipe
    return resolve_dims(load_recipe(path).config.parallel, gpus_of(path)[0])


def plan_of(path: Path, system: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    gpus = str(gpus_of(path)[0])
    code = run(["plan", str(path), "--gpus", gpus, "--hardware", system, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("path", "system"), RUNS, ids=run_name)
def test_the_plan_calls_a_layout_legal_and_says_that_it_fits(
    path: Path, system: str, capsys: pytest.CaptureFixture[str]
):
    code, tree = plan_of(path, system, capsys)
    assert tree["violations"] == []
    assert tree["layout"]["memory"]["total"] <= tree["hardware"]["memory"]
    assert code == 0


@pytest.mark.parametrize("path", LAID_OUT, ids=name)
def test_training_would_start_with_that_number_of_gpus(path: Path):
    config = load_recipe(path).config
    dims = resolve_dims(config.parallel, gpus_of(path)[0])
    assert findings(config, plan_training(config), dims) == []


@pytest.mark.parametrize("path", LAYOUTS, ids=name)
def test_a_layout_says_nothing_but_how_the_work_is_shared(path: Path):
    values = read_yaml(path).values
    assert set(values) <= {"parallel", "batch", "recompute", "precision"}
    assert set(values["batch"]) == {"micro_batch"}


@pytest.mark.parametrize("path", LAID_OUT, ids=name)
def test_a_recipe_for_gpus_is_a_phase_and_a_layout_for_as_many(path: Path):
    values = read_yaml(path).values
    phase, layout = values.pop("extends")
    assert values == {}
    assert path.stem.startswith(Path(phase).stem)
    assert gpus_of(path) == gpus_of(path.parent / layout)
    # the name stays, so that a run can go on with another number of GPUs
    assert load_recipe(path).config.name == load_recipe(path.parent / phase).config.name


def test_every_layout_is_used():
    used = {path.parent / read_yaml(path).values["extends"][1] for path in LAID_OUT}
    assert used == set(LAYOUTS)


# Nano's report, section 2.5; Super's, section 2.6; Megatron-Bridge's performance summary.
@pytest.mark.parametrize(
    ("recipe", "tp", "pp", "cp", "ep"),
    [
        ("nano/long_context_256xh100.yaml", 8, 4, 8, 8),
        ("super/long_context_128xgb200.yaml", 2, 1, 64, 64),
        ("nano/pretrain_8xh100.yaml", 1, 1, 1, 8),
        ("nano/pretrain_64xb200.yaml", 1, 1, 1, 8),
        ("super/pretrain_64xb200.yaml", 2, 1, 1, 64),
    ],
)
def test_layouts_that_were_published_are_these(recipe: str, tp: int, pp: int, cp: int, ep: int):
    dims = dims_of(recipe)
    assert (dims.tp, dims.pp, dims.cp, dims.ep) == (tp, pp, cp, ep)


def test_only_blackwell_computes_in_nvfp4():
    presets = {name(path): load_recipe(path).config.precision.preset for path in LAID_OUT}
    quantized = {recipe: preset for recipe, preset in presets.items() if preset != "bf16"}
    assert quantized == {"super/pretrain_64xb200.yaml": "nvfp4_super"}


def long_context(model: str) -> PretrainConfig:
    return load_recipe(RECIPES / model / "long_context.yaml").config


# (seq_len, rows of a step) of each phase, its steps and its tokens
@pytest.mark.parametrize(
    ("model", "rate", "phases"),
    [
        ("nano", 1e-5, [(4_808, 121e9, {524_288: 48, 4_096: 6_144})]),
        (
            "super",
            4.5e-6,
            [(2_027, 34e9, {1_048_576: 16}), (1_014, 17e9, {1_048_576: 16, 4_096: 4_096})],
        ),
    ],
)
def test_long_rows_batches_and_rates_are_those_of_the_reports(
    model: str, rate: float, phases: list[tuple[int, float, dict[int, int]]]
):
    plan = plan_training(long_context(model))
    for phase, (steps, tokens, rows) in zip(plan.timeline.phases, phases, strict=True):
        assert phase.num_steps == steps
        assert phase.num_steps * phase.tokens_per_step == pytest.approx(tokens, rel=1e-3)
        assert {n.seq_len: phase.tokens_per_step // n.seq_len for n in phase.lengths} == rows
    assert {plan.lr(step) for step in (0, 1, plan.num_steps - 1)} == {rate}


@pytest.mark.parametrize("model", ["nano", "super"])
def test_long_context_goes_on_from_pre_training_with_its_model_and_losses(model: str):
    long, base = long_context(model), load_recipe(RECIPES / model / "pretrain.yaml").config
    assert long.init_from == f"{base.output}/{base.name}"
    same = {"max_position_embeddings": 0}
    assert long.model.model_copy(update=same) == base.model.model_copy(update=same)
    assert (long.optimizer, long.loss) == (base.optimizer, base.loss)
    assert long.data.tokenizer == base.data.tokenizer


def test_the_page_shows_what_the_plan_says(capsys: pytest.CaptureFixture[str]):
    page = (ROOT / "docs/recipes.md").read_text()
    row = r"^\| `recipes/(\w+/\w+\.yaml)` \| (\d+) x (\w+) \| (\d+)/(\d+)/(\d+)/(\d+) \| (\d+) \|"
    row += r".*\| ([\d.]+) of (\d+) GB \| ([\d,]+) \|.*\|$"
    shown = re.findall(row, page, re.MULTILINE)
    assert {(recipe, system.lower()) for recipe, _, system, *_ in shown} == {
        (name(path), system) for path, system in RUNS
    }
    for recipe, gpus, system, tp, pp, cp, ep, rows, memory, limit, speed in shown:
        path = RECIPES / recipe
        _, tree = plan_of(path, system.lower(), capsys)
        dims = tree["layout"]["dims"]
        assert [dims[axis] for axis in ("tp", "pp", "cp", "ep")] == [*map(int, (tp, pp, cp, ep))]
        assert int(gpus) == tree["accelerators"]
        assert int(rows) == load_recipe(path).config.batch.micro_batch
        assert float(memory) == pytest.approx(tree["layout"]["memory"]["total"] / 1e9, abs=0.06)
        assert int(limit) == tree["hardware"]["memory"] / 1e9
        said = int(speed.replace(",", ""))
        # two of a thousand: a later fit of the factors should be shown, their last digits need not
        assert said == pytest.approx(tree["layout"]["throughput"]["per_accelerator"], rel=2e-3)
