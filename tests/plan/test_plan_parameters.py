"""Parameters and FLOPs from the dimensions, against models that are built and published sizes."""

from collections import Counter

import pytest

from nemotron.model.build import build_on_meta
from nemotron.model.config import ModelConfig
from nemotron.model.flops import linear_flops, training_flops_per_token
from nemotron.model.parameters import (
    by_kind,
    count_parameters,
    embedding_split,
    head_split,
    layer_split,
    mtp_split,
)
from nemotron.plan.published import models
from nemotron.plan.work import flops_by_format
from nemotron.precision.config import PrecisionConfig
from nemotron.train.kinds import kind_of

MODELS = models()
NANO, SUPER = MODELS["Nano"], MODELS["Super"]
ODD = ModelConfig(
    vocab_size=65,
    hidden_size=24,
    hybrid_override_pattern="M*E-M",
    mamba_num_heads=6,
    mamba_head_dim=10,
    n_groups=3,
    ssm_state_size=7,
    use_conv_bias=False,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=5,
    intermediate_size=31,
    n_routed_experts=9,
    num_experts_per_tok=4,
    moe_intermediate_size=11,
    moe_shared_expert_intermediate_size=13,
    num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E",
)
TIED = ODD.model_copy(update={"tie_word_embeddings": True, "moe_latent_size": 17})


@pytest.mark.parametrize("model", [*MODELS.values(), ODD, TIED])
def test_every_kind_has_as_many_parameters_as_the_model_that_is_built(model: ModelConfig):
    built = build_on_meta(model)
    counts: Counter[str] = Counter()
    for name, parameter in built.named_parameters():
        counts[kind_of(name, model)] += parameter.numel()
    assert by_kind(model) == counts


def test_the_published_sizes_are_reproduced():
    assert [
        f"{count_parameters(MODELS[n]).total / 1e9:.2f}" for n in ("Nano", "Super", "Ultra")
    ] == [
        "31.58",
        "120.67",
        "549.31",
    ]
    assert count_parameters(NANO).active / 1e9 == pytest.approx(3.580, abs=5e-4)
    assert count_parameters(SUPER).active / 1e9 == pytest.approx(12.770, abs=5e-4)
    assert by_kind(MODELS["Lightning"])["mtp"] == 1_335_325_824
    assert by_kind(SUPER)["mtp"] == 2_942_324_736


@pytest.mark.parametrize("tp", [1, 3])
def test_the_parts_add_up_to_the_whole(tp: int):
    parts = [layer_split(ODD, letter, tp) for letter in ODD.hybrid_override_pattern]
    whole = sum(parts, embedding_split(ODD) + head_split(ODD) + mtp_split(ODD, tp))
    assert whole.total == sum(by_kind(ODD).values())


def test_key_value_heads_that_the_ranks_outnumber_are_on_each_of_them():
    within, beyond = layer_split(SUPER, "*", 2), layer_split(SUPER, "*", 4)
    assert beyond.whole - within.whole == 2 * 4096 * 2 * 128
    assert beyond.total == within.total


def test_a_token_of_super_takes_the_published_work():
    formats = flops_by_format(SUPER, PrecisionConfig(), 8192, 2)
    assert sum(formats.values()) / 1e9 == pytest.approx(85.4, abs=0.05)


def test_formats_add_up_to_the_work_of_a_token():
    for preset in ("nvfp4_super", "mxfp8", "bf16"):
        precision = PrecisionConfig.model_validate({"compute": "bf16", "preset": preset})
        formats = flops_by_format(ODD, precision, 63, 2)
        assert sum(formats.values()) == pytest.approx(training_flops_per_token(ODD, 63, 2))


def test_linear_layers_take_the_work_of_their_matrices():
    built = build_on_meta(ODD)
    flops = linear_flops(ODD, num_mtp_depths=1)
    for name, value in flops.items():
        count = sum(p.numel() for p in built.get_submodule(name).parameters())
        if name.endswith("experts") and "shared" not in name:
            count = count // ODD.n_routed_experts * ODD.num_experts_per_tok
        assert value == 6 * count, name


def test_formats_go_where_the_recipe_says():
    precision = PrecisionConfig.model_validate({"compute": "bf16", "preset": "nvfp4_super"})
    formats = flops_by_format(SUPER, precision, 8192, 2)
    assert formats.keys() == {"bf16", "fp8", "fp4"}
    only_out_proj = 40 * 6 * 8192 * 4096
    # 14 of 88 blocks stay in bf16, among them 6 of the 40 of Mamba
    assert formats["fp8"] == pytest.approx(only_out_proj * 34 / 40)


def test_the_busiest_experts_work_more():
    even = flops_by_format(NANO, PrecisionConfig(), 4096, 0)["fp32"]
    busy = flops_by_format(NANO, PrecisionConfig(), 4096, 0, load=1.5)["fp32"]
    assert busy - even == pytest.approx(0.5 * 23 * 6 * 6 * 2 * 2688 * 1856)
