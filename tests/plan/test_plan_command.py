"""`nemotron plan`: what it prints, its exit codes, the search."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from nemotron.cli import run
from nemotron.plan.build import layout_of, read_setting, stretches_of
from nemotron.plan.hardware import SYSTEMS
from nemotron.plan.search import search
from nemotron.plan.throughput import FITTED
from nemotron.recipe.load import load_recipe
from nemotron.train.schedule import plan_training

ROOT = Path(__file__).parents[2]
NANO, SUPER = (str(ROOT / f"recipes/{name}/pretrain.yaml") for name in ("nano", "super"))
TINY = str(ROOT / "recipes/tiny/pretrain.yaml")


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = run(["plan", *words])
    return code, capsys.readouterr().out


def facts(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code, text = answer(capsys, *words, "--json")
    return code, json.loads(text)


def test_it_says_all_that_was_promised(capsys: pytest.CaptureFixture[str]):
    code, text = answer(capsys, SUPER, "--gpus", "256", "--hardware", "h100", "parallel.ep=64")
    assert code == 0
    for part in (
        "total 120.67 B, active 12.77 B",
        "85.43 GFLOP",
        "dense states",
        "(largest)",
        "fits: ",
        "expert dispatch",
        "tokens/s",
        "bubble 0.0 %",
        "% of the peak in products",
        "GPU hours",
        "quality",
        "Super, 64 x H100, bf16: 2,969 tokens/s on each published",
    ):
        assert part in text, part
    assert not set("│┃━") & set(text)


def test_an_illegal_layout_is_told_rule_by_rule_and_not_predicted(
    capsys: pytest.CaptureFixture[str],
):
    code, text = answer(capsys, NANO, "--gpus", "64", "parallel.tp=3", "parallel.ep=7")
    assert code == 1
    assert (
        "parallel needs multiples of pp x dp_replicate x cp x tp = 3 processes, but there are 64"
        in text
    )
    assert "parallel.tp = 3 does not divide model.mamba_num_heads = 64; use 1, 2, 4" in text
    assert "parallel.ep = 7 does not divide model.n_routed_experts = 128; use 1, 2, 4" in text
    assert "parallel.ep = 7 does not divide dp_shard x cp x tp = 63; the nearest is" not in text
    assert "tokens/s, " not in text


def test_a_layout_that_does_not_fit_is_a_failure(capsys: pytest.CaptureFixture[str]):
    code, tree = facts(capsys, SUPER, "--gpus", "8", "--hardware", "h100")
    assert code == 1
    assert not tree["fits"]
    assert tree["layout"]["memory"]["total"] > tree["hardware"]["memory"]


def test_phases_take_their_tokens_at_the_predicted_speed(capsys: pytest.CaptureFixture[str]):
    _, tree = facts(capsys, SUPER, "--gpus", "256", "parallel.ep=64")
    phases = tree["layout"]["phases"]
    assert [phase["phase"] for phase in phases] == ["diversity", "quality"]
    assert sum(phase["tokens"] for phase in phases) == pytest.approx(25e12, rel=1e-6)
    speed = tree["layout"]["throughput"]["tokens_per_second"]
    for phase in phases:
        assert phase["days"] * 86400 * speed == pytest.approx(phase["tokens"])
        assert phase["accelerator_hours"] == pytest.approx(phase["days"] * 24 * 256)
    _, tree = facts(capsys, SUPER, "--gpus", "256", "parallel.ep=64", "--tokens", "1e12")
    [whole] = tree["layout"]["phases"]
    assert whole["tokens"] == 1e12


def test_lengths_of_a_phase_share_its_steps():
    lengths = "phases=[{name: long, steps: 900_000, lengths: [{seq_len: 8192, share: 2}, "
    lengths += "{seq_len: 4096, share: 1}]}]"
    config = load_recipe(NANO, [lengths, "schedule.total_tokens=null"]).config
    parts = stretches_of(plan_training(config))
    assert [(part.seq_len, part.rows, part.steps) for part in parts] == [
        (8192, 3072, pytest.approx(600_000)),
        (4096, 6144, pytest.approx(300_000)),
    ]


def test_a_stated_efficiency_replaces_the_fit(capsys: pytest.CaptureFixture[str]):
    words = (NANO, "--gpus", "64", "parallel.ep=8", "recompute=none", "batch.micro_batch=1")
    _, slow = facts(capsys, *words, "--efficiency", "0.2")
    _, fast = facts(capsys, *words, "--efficiency", "0.4")
    ratio = [t["layout"]["throughput"]["seconds"]["arithmetic"] for t in (slow, fast)]
    assert ratio[0] == pytest.approx(2 * ratio[1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--efficiency", "1.5"], "--efficiency = 1.5 must lie above 0 and at most at 1;"),
        (["--tokens", "-3"], "--tokens = -3 must be a number above 0, for example 25e12."),
        (["--hardware", "tpu"], "--hardware = tpu is unknown; use one of h100, h200, b200"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert run(["plan", TINY, *words]) == 2
    assert said in capsys.readouterr().err


def test_formats_that_are_emulated_are_predicted_as_if_they_were_not(
    capsys: pytest.CaptureFixture[str],
):
    words = ("--gpus", "256", "--hardware", "gb200", "parallel.ep=64", "precision.preset=mxfp8")
    _, text = answer(capsys, SUPER, *words)
    assert "where no backend computes in the quantized formats" in text
    _, text = answer(capsys, SUPER, *words[:-1])
    assert "where no backend" not in text


def test_the_trace_is_shown_beside_the_formula(capsys: pytest.CaptureFixture[str]):
    code, tree = facts(capsys, TINY, "--gpus", "2", "--check-memory")
    assert code == 0
    for kept in tree["kept_for_backward"]:
        assert kept["formula"] == pytest.approx(kept["traced"], rel=0.01)


@pytest.mark.parametrize(("recipe", "gpus", "system"), [(SUPER, 64, "h100"), (NANO, 24, "b200")])
def test_the_search_finds_layouts_that_are_legal_and_fit(recipe: str, gpus: int, system: str):
    config = load_recipe(recipe).config
    setting = read_setting(config, plan_training(config), SYSTEMS[system])
    found = search(setting, gpus, FITTED)
    assert len(found.best) == 10
    assert found.legal >= found.fitting >= 10
    speeds = [candidate.prediction.tokens_per_second for candidate in found.best]
    assert speeds == sorted(speeds, reverse=True)
    for candidate in found.best:
        job = candidate.prediction.job
        assert job.dims.world == gpus
        assert setting.violations(job.dims, job.micro_batch) == []
        assert candidate.bytes <= SYSTEMS[system].memory


@pytest.mark.slow
def test_a_layout_of_the_search_can_be_put_behind_the_recipe(capsys: pytest.CaptureFixture[str]):
    words = ("--gpus", "64", "--hardware", "h100")
    _, tree = facts(capsys, SUPER, *words, "--search")
    best = tree["search"]["best"][0]
    code, again = facts(capsys, SUPER, *words, *shlex.split(best["overrides"]))
    assert code == 0
    assert again["layout"]["throughput"] == best["throughput"]
    assert again["layout"]["memory"]["total"] == best["bytes"]


def test_when_nothing_fits_the_leanest_is_told(capsys: pytest.CaptureFixture[str]):
    _, text = answer(capsys, SUPER, "--gpus", "8", "--search")
    assert "0 fit into 80 GB" in text
    assert "the leanest needs" in text


def test_the_layout_is_read_from_the_recipe():
    overrides = ["parallel.pp=2", "parallel.tp=2", "parallel.ep=16"]
    config = load_recipe(SUPER, overrides).config
    setting = read_setting(config, plan_training(config), SYSTEMS["h100"])
    dims, found = layout_of(setting, 64)
    assert (dims.pp, dims.dp_shard, dims.tp, dims.ep, found) == (2, 16, 2, 16, [])
