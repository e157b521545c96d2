"""Rules: which layer gets which format, for the published model and for any other."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from nemotron.cli import run
from nemotron.errors import UserError
from nemotron.model.hybrid import HybridLM
from nemotron.precision.apply import Quantization
from nemotron.precision.config import PrecisionConfig
from nemotron.precision.policy import assign, tail_blocks
from nemotron.precision.random_bits import Draw
from nemotron.recipe.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def config(**values: object) -> PrecisionConfig:
    return PrecisionConfig.model_validate({"compute": "bf16", **values})


def meta_model(name: str) -> HybridLM:
    with torch.device("meta"):
        return HybridLM(load_recipe(RECIPES / name).config.model)


def counts_of(table) -> Counter:
    return Counter((line.format, line.kind) for line in table)


def test_super_has_the_published_assignment():
    table = assign(meta_model("super/pretrain.yaml"), config(), "nvfp4_super")
    found = counts_of(table)
    # the last 14 of 88 blocks hold 6 Mamba, 1 attention and 7 MoE layers
    assert found["nvfp4", "mamba.in_proj"] == 34
    assert found["mxfp8", "mamba.out_proj"] == 34
    assert found["nvfp4", "moe.experts"] == 33
    assert found["nvfp4", "moe.shared_experts"] == 66
    assert found["bf16", "mamba.out_proj"] == found["bf16", "mamba.in_proj"] == 6
    assert not [line for line in table if line.format != "bf16" and "attention" in line.kind]
    assert not [line for line in table if line.format != "bf16" and line.kind == "moe.latent"]
    assert not [line for line in table if line.format != "bf16" and line.module.startswith("mtp.")]
    reasons = {line.reason for line in table if line.module.startswith("backbone.layers.74.")}
    assert reasons == {"last 14 of 88 blocks"}
    assert {line.reason for line in table if line.module == "backbone.layers.0.mixer.in_proj"} == {
        "default of nvfp4_super"
    }


def test_a_tail_is_the_share_of_any_depth():
    assert [tail_blocks(14 / 88, depth) for depth in (88, 52, 10, 4)] == [14, 8, 2, 1]


@pytest.mark.parametrize("preset", ["fp8_current", "fp8_block"])
def test_fp8_leaves_two_blocks_at_either_end(preset: str):
    table = assign(meta_model("tiny/pretrain.yaml"), config(), preset)
    kept = {line.module.split(".")[2] for line in table if line.format == "bf16"}
    assert kept == {"0", "1", "8", "9"}
    assert {line.format for line in table} == {"bf16", preset}


def test_the_first_rule_that_fits_decides_and_rules_come_before_the_preset():
    rules = [
        {"format": "bf16", "name": "backbone.layers.0.*"},
        {"format": "fp8_block", "kind": "mamba.*", "first_block": 2, "last_block": 2},
        {"format": "mxfp8", "kind": "attention.*"},
    ]
    table = assign(meta_model("tiny/pretrain.yaml"), config(rules=rules), "nvfp4_all")
    by_name = {line.module: line.format for line in table}
    assert by_name["backbone.layers.0.mixer.in_proj"] == "bf16"
    assert by_name["backbone.layers.2.mixer.in_proj"] == "fp8_block"
    assert by_name["backbone.layers.3.mixer.q_proj"] == "mxfp8"
    assert by_name["mtp.layers.0.mixer.o_proj"] == "mxfp8"
    assert by_name["backbone.layers.5.mixer.in_proj"] == "nvfp4"


def test_what_is_no_linear_layer_is_in_no_table():
    names = {
        line.module for line in assign(meta_model("tiny/pretrain.yaml"), config(), "nvfp4_all")
    }
    for part in ("gate", "norm", "conv1d", "embeddings", "lm_head", "eh_proj"):
        assert not [name for name in names if name.endswith(part)]


def test_a_rule_that_decides_nothing_is_refused():
    for rule in (
        {"format": "bf16", "kind": "mamba.inproj"},
        {"format": "bf16", "first_block": 10},
    ):
        rules = [{"format": "mxfp8", "kind": "moe.*"}, rule]
        with pytest.raises(UserError, match=r"precision.rules.1 decides no layer \((kind|blocks)"):
            assign(meta_model("tiny/pretrain.yaml"), config(rules=rules), "nvfp4_all")


def test_the_table_is_shown_for_every_switch(capsys):
    words = ["precision.compute=bf16", "precision.preset=nvfp4_super"]
    words.append("precision.switches=[{step: 3, preset: mxfp8}]")
    recipe = str(RECIPES / "tiny/pretrain.yaml")
    assert run(["recipe", "show", recipe, *words, "--precision"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "from step 0: preset nvfp4_super"
    assert "from step 3: preset mxfp8" in lines
    [first] = [line for line in lines if "backbone.layers.0.mixer.out_proj" in line][:1]
    assert first.split() == [
        "backbone.layers.0.mixer.out_proj", "mxfp8", "emulate",
        "mamba.out_proj:", "kind", "mamba.out_proj",
    ]  # fmt: skip


def test_switches_change_the_preset_at_their_step():
    changing = config(
        preset="nvfp4_super",
        switches=[{"step": 5, "preset": "mxfp8"}, {"step": 9, "preset": "bf16"}],
    )
    presets = [changing.preset_at(step) for step in (0, 4, 5, 8, 9, 100)]
    assert presets == ["nvfp4_super"] * 2 + ["mxfp8"] * 2 + ["bf16"] * 2


def test_a_model_changes_its_formats_and_keeps_its_parameters():
    model = HybridLM(load_recipe(RECIPES / "tiny/smoke.yaml").config.model)
    model.init_weights(1)
    model.compute_dtype = torch.bfloat16
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    ids = torch.arange(64).view(2, 32)
    plain = model(ids)
    changing = config(preset="nvfp4_all", switches=[{"step": 1, "preset": "bf16"}])
    quantization = Quantization(model, changing, seed=3)
    assert not torch.equal(model(ids), plain)
    quantization.begin(1, 0)
    assert torch.equal(model(ids), plain)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"preset": "nvfp4_all", "compute": "fp32"},
            "cannot be quantized further; use compute: bf16",
        ),
        ({"rules": [{"format": "mxfp8"}]}, "format stands alone; give the rule a condition"),
        (
            {"switches": [{"step": 9, "preset": "bf16"}, {"step": 5, "preset": "mxfp8"}]},
            "put them in order, each once",
        ),
        ({"preset": "nvfp5"}, "Input should be"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values: dict, sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        config(**values)


def test_every_layer_call_step_and_micro_batch_draws_bits_of_its_own():
    model = HybridLM(load_recipe(RECIPES / "tiny/smoke.yaml").config.model)
    quantization = Quantization(model, config(preset="nvfp4_all"), seed=3)
    draws = []

    def draw_all(step: int, first_token: int) -> list[Draw]:
        quantization.begin(step, first_token)
        return [quantization._draw(name) for name in ("a", "b", "a")]

    for step, first_token in ((0, 0), (0, 64), (1, 0)):
        draws += draw_all(step, first_token)
    assert len(set(draws)) == len(draws)
    assert draw_all(0, 64) == draws[3:6]
