"""The shipped recipes: sizes counted on models without memory, constants as published."""

from pathlib import Path

import pytest
import torch

from nemotron.model.hybrid import HybridLM
from nemotron.recipe.load import load_recipe
from nemotron.train.config import PretrainConfig
from nemotron.train.flops import count_parameters
from nemotron.train.schedule import build_schedule

RECIPES = Path(__file__).parents[1] / "recipes"
COMPLETE = sorted(p for p in RECIPES.rglob("*.yaml") if p.name != "model.yaml")


def load(name: str) -> PretrainConfig:
    return load_recipe(RECIPES / name).config


@pytest.mark.parametrize("path", COMPLETE, ids=lambda p: str(p.relative_to(RECIPES)))
def test_every_recipe_is_a_run_with_a_schedule(path: Path):
    config = load_recipe(path).config
    schedule = build_schedule(config.schedule, config.batch.global_tokens)
    assert schedule.num_steps >= 1
    assert schedule.lr(schedule.num_steps) == pytest.approx(config.schedule.min)


@pytest.mark.parametrize(
    ("name", "total", "active", "mtp"),
    [
        # technical reports and NVIDIA/Megatron-Bridge's model verification cards
        ("nano/pretrain.yaml", 31_577_937_344, 3.58, 0),
        ("super/pretrain.yaml", 120_668_687_360, 12.77, 2_942_324_736),
    ],
)
def test_nano_and_super_have_their_published_sizes(name: str, total: int, active: float, mtp: int):
    config = load(name).model
    with torch.device("meta"):
        model = HybridLM(config)
    count = count_parameters(model, config)
    assert count.total == total
    assert round(count.active / 1e9, 2) == active
    assert count.mtp == mtp


def test_nanos_constants_are_the_published_ones():
    config = load("nano/pretrain.yaml")
    schedule, optimizer = config.schedule, config.optimizer
    assert (config.data.seq_len, config.batch.global_tokens) == (8192, 8192 * 3072)
    assert (schedule.peak, schedule.min) == (1e-3, 1e-5)
    assert (schedule.total_tokens, schedule.warmup_tokens, schedule.decay_tokens) == (
        25e12,
        8.4e9,
        5e12,
    )
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.clip) == (0.1, 1.0)
    assert optimizer.router_bias_update_rate == 1e-3
    assert config.loss.moe_aux_loss_coeff == 1e-4
    assert config.model.initializer_range == 0.0173
    assert config.model.routed_scaling_factor == 2.5
    assert not config.data.reset_documents
    assert build_schedule(schedule, config.batch.global_tokens).num_steps == 993_411


def test_supers_constants_are_the_published_ones():
    config = load("super/pretrain.yaml")
    schedule = config.schedule
    assert (config.data.seq_len, config.batch.global_tokens) == (8192, 8192 * 3072)
    assert (schedule.peak, schedule.min) == (4.5e-4, 4.5e-6)
    assert (schedule.total_tokens, schedule.warmup_tokens, schedule.decay_tokens) == (
        25e12,
        200e9,
        5e12,
    )
    assert schedule.decay == "minus_sqrt"
    assert (config.loss.mtp_num_depths, config.loss.mtp_loss_factor) == (2, 0.3)
    assert not config.loss.mtp_detach_heads
    assert config.model.initializer_range == 0.014
    assert config.model.routed_scaling_factor == 5.0
    assert (config.model.n_routed_experts, config.model.num_experts_per_tok) == (512, 22)
