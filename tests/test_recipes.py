"""The shipped recipes: they load, have the published sizes, and train as the reports say."""

from collections import Counter
from pathlib import Path

import pytest

from nemotron.data.config import BlendConfig, leaves
from nemotron.hf.names import disk_parameters, disk_tensors
from nemotron.model.build import build_on_meta
from nemotron.model.parameters import count_parameters
from nemotron.recipe.blend import read_blend
from nemotron.recipe.load import load_recipe
from nemotron.train.config import PretrainConfig
from nemotron.train.schedule import Schedule, build_schedule, plan_training

RECIPES = Path(__file__).parents[1] / "recipes"
BLENDS = sorted(RECIPES.rglob("blends/*.yaml"))
PARTS = [*BLENDS, *RECIPES.rglob("layouts/*.yaml"), *RECIPES.rglob("model.yaml")]
COMPLETE = sorted(set(RECIPES.rglob("*.yaml")) - set(PARTS))
PUBLISHED = ["nano", "super"]
OURS = [path for path in COMPLETE if path.relative_to(RECIPES).parts[0] not in PUBLISHED]


def load(name: str) -> PretrainConfig:
    return load_recipe(RECIPES / name / "pretrain.yaml").config


def schedule_of(config: PretrainConfig) -> Schedule:
    return build_schedule(config.schedule, config.batch.global_tokens)


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_recipe_loads_with_a_model_and_a_schedule_that_can_be_built(path: Path):
    recipe = load_recipe(path)
    config = recipe.config
    count, built = count_parameters(config.model), build_on_meta(config.model)
    assert count.total + count.mtp == sum(p.numel() for p in built.parameters())
    plan = recipe.trained.plan(config)
    assert 0 < plan.lr(0) <= config.schedule.peak
    end = config.schedule.peak if config.schedule.kind == "constant" else config.schedule.min
    assert plan.lr(plan.num_steps - 1) == pytest.approx(end, rel=0.01)


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_one_number_makes_a_recipe_of_ours_shorter_or_longer(path: Path):
    for steps in (1, 2, 3, 7, 5000):
        recipe = load_recipe(path, [f"schedule.total_steps={steps}"])
        plan = recipe.trained.plan(recipe.config)
        rates = [plan.lr(step) for step in range(plan.num_steps)]
        assert len(rates) == steps
        assert max(rates) == recipe.config.schedule.peak
        assert steps < 3 or rates[-1] == pytest.approx(recipe.config.schedule.min, abs=1e-12)


# Sums and numbers of entries of the files in NVIDIA-NeMo/Nemotron; Nano's long context is ours.
@pytest.mark.parametrize(
    ("name", "entries", "total"),
    [
        ("nano/blends/open", 23, 23.0),
        ("nano/blends/long_context", 24, 99.0),
        ("super/blends/phase1", 29, 80.4),
        ("super/blends/phase2", 27, 82.9),
        ("super/blends/long_context", 28, 103.6),
    ],
)
def test_blends_have_the_published_weights(name: str, entries: int, total: float):
    blend = BlendConfig.model_validate(read_blend(RECIPES / f"{name}.yaml").values)
    assert len(leaves(blend)) == entries
    assert sum(leaf.weight for leaf in leaves(blend)) == pytest.approx(total, abs=1e-9)


def test_super_changes_its_blend_after_four_fifths_of_the_tokens():
    diversity, quality = plan_training(load("super")).timeline.phases
    assert diversity.num_steps == 794_723
    assert diversity.num_steps + quality.num_steps == 993_411
    names = [{leaf.source.name for leaf in p.lengths[0].leaves} for p in (diversity, quality)]
    assert names[0] - names[1] == {"cc-v2-medium-quality", "cc-v2.1-medium-quality"}
    assert not names[1] - names[0]


def test_the_second_phase_of_nano_begins_after_its_decay():
    diversity, quality = plan_training(load("nano")).timeline.phases
    assert diversity.num_steps * diversity.tokens_per_step == pytest.approx(23.5e12, rel=1e-6)
    assert diversity.num_steps + quality.num_steps == 993_411
    assert schedule_of(load("nano")).total - schedule_of(load("nano")).decay == 20e12


# Trunk and MTP block were counted on the published configurations; the active parameters are
# those of the reports' tables, which have three and four digits.
@pytest.mark.parametrize(
    ("name", "total", "mtp", "active"),
    [
        ("nano", 31_577_937_344, 0, 3.58e9),
        ("super", 120_668_687_360, 2_942_324_736, 12.77e9),
    ],
)
def test_models_have_the_published_number_of_parameters(
    name: str, total: int, mtp: int, active: float
):
    config = load(name).model
    count = count_parameters(config)
    assert (count.total, count.mtp) == (total, mtp)
    assert count.active == pytest.approx(active, abs=0.005e9)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("nano", {"M": 23, "E": 23, "*": 6}), ("super", {"M": 40, "E": 40, "*": 8})],
)
def test_models_have_the_published_layers(name: str, kinds: dict[str, int]):
    assert Counter(load(name).model.hybrid_override_pattern) == kinds


# Keys and bytes of the released checkpoints' index files.
@pytest.mark.parametrize(
    ("name", "count", "total_size"),
    [("nano", 6_243, None), ("super", 42_683, 247_222_108_160)],
)
def test_an_export_would_hold_the_released_checkpoints_tensors(
    name: str, count: int, total_size: int | None
):
    tensors = disk_tensors(disk_parameters(load(name).model))
    assert len({tensor.name for tensor in tensors}) == len(tensors) == count
    assert total_size in (None, sum(tensor.num_bytes for tensor in tensors))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_has_3072_rows_of_8192_tokens(name: str):
    config = load(name)
    assert config.data.seq_len == 8_192
    assert config.batch.global_tokens == 3_072 * 8_192


@pytest.mark.parametrize(
    ("name", "peak", "warmup_steps"), [("nano", 1e-3, 334), ("super", 4.5e-4, 7_948)]
)
def test_the_learning_rate_follows_the_reports(name: str, peak: float, warmup_steps: int):
    schedule = schedule_of(load(name))
    assert schedule.shape == "minus_sqrt"
    assert schedule.num_steps == 993_411
    assert schedule.lr(0) == pytest.approx(peak * 25_165_824 / schedule.warmup, rel=1e-12)
    assert schedule.lr(warmup_steps - 2) < peak == schedule.lr(warmup_steps - 1)
    # the plateau lasts until 20 T tokens; a quarter into the decay half of the way is gone
    assert schedule.lr_at(20e12) == peak > schedule.lr_at(20.001e12)
    assert schedule.lr_at(21.25e12) == pytest.approx((peak + peak / 100) / 2, rel=1e-12)
    assert schedule.lr_at(25e12) == pytest.approx(peak / 100, rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_optimizer_is_that_of_the_reports(name: str):
    optimizer = load(name).optimizer
    assert (optimizer.name, optimizer.betas) == ("adamw", (0.9, 0.95))
    assert (optimizer.eps, optimizer.weight_decay, optimizer.clip) == (1e-8, 0.1, 1.0)
    assert optimizer.router_bias_update_rate == 1e-3


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_loss_is_that_of_the_reports(name: str):
    config = load(name)
    assert config.loss.moe_aux_loss_coeff == 1e-4
    assert not config.data.reset_documents  # Megatron's rows are concatenated documents
    assert not config.loss.mtp_detach_heads


def test_super_predicts_two_tokens_ahead_with_one_block():
    config = load("super")
    assert config.model.num_nextn_predict_layers == 1
    assert config.model.mtp_pattern == "*E"
    assert (config.loss.mtp_num_depths, config.loss.mtp_loss_factor) == (2, 0.3)
    assert load("nano").model.mtp_pattern == ""


@pytest.mark.parametrize(
    ("name", "experts", "chosen", "scale", "deviation"),
    [("nano", 128, 6, 2.5, 0.0173), ("super", 512, 22, 5.0, 0.014)],
)
def test_router_and_initial_weights_are_those_of_the_released_models(
    name: str, experts: int, chosen: int, scale: float, deviation: float
):
    model = load(name).model
    assert (model.n_routed_experts, model.num_experts_per_tok) == (experts, chosen)
    assert model.routed_scaling_factor == scale
    assert model.initializer_range == deviation
