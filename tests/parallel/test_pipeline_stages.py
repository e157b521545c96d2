"""How layers are divided into stages, and what a stage keeps of the model."""

import itertools

import pytest
import torch

from nemotron.model.config import ModelConfig
from nemotron.model.flops import depth_flops, head_flops, layer_flops
from nemotron.model.hybrid import HybridLM
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.stages import cut, shared_parameters, split_stages
from tests.support.models import build, build_config

AUTO = ParallelConfig()
SUPER = ModelConfig(
    vocab_size=131072,
    hidden_size=4096,
    hybrid_override_pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
    "EMEMEMEM*EMEMEMEME",
    mamba_num_heads=128,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=2688,
    moe_shared_expert_intermediate_size=5376,
    moe_latent_size=1024,
    num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E",
)
"""NVIDIA Nemotron 3 Super, 120B-A12B."""


def costs(config: ModelConfig, stages: list[range], seq_len: int, depths: int) -> list[float]:
    pattern = config.hybrid_override_pattern
    own = [sum(layer_flops(config, pattern[i], seq_len) for i in stage) for stage in stages]
    own[-1] += head_flops(config) + depths * depth_flops(config, seq_len)
    return own


def explicit(stages: str) -> ParallelConfig:
    return ParallelConfig.model_validate({"pipeline": {"stages": stages}})


def letters(config: ModelConfig, stages: list[range]) -> str:
    return "|".join(config.hybrid_override_pattern[s.start : s.stop] for s in stages)


def test_explicit_stages_are_taken_as_written():
    config = build_config(hybrid_override_pattern="MEM*EMEM")
    assert split_stages(config, explicit("M|EM*|EMEM"), 3, 32, 0) == [
        range(1),
        range(1, 4),
        range(4, 8),
    ]


def test_costs_are_the_published_ones():
    # forward MFLOP per token at 8192 tokens: M 225, E 351, * 138, head 1074, each depth 1631
    found = [layer_flops(SUPER, letter, 8192) / 1e6 for letter in "ME*"]
    assert [round(x) for x in found] == [225, 351, 138]
    assert round(head_flops(SUPER) / 1e6) == 1074
    assert round(depth_flops(SUPER, 8192) / 1e6) == 1631
    last = head_flops(SUPER) + 2 * depth_flops(SUPER, 8192)
    assert last / sum(costs(SUPER, [range(88)], 8192, 2)) == pytest.approx(0.152, abs=5e-4)


@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_the_last_stage_has_fewer_layers_for_head_and_prediction(num_stages: int):
    stages = split_stages(SUPER, AUTO, num_stages, 8192, 2)
    lengths = [len(stage) for stage in stages]
    assert sum(lengths) == 88
    assert lengths[-1] < min(lengths[:-1])
    # head and two depths are 15.2 % of the model, as much as 15.8 of its 88 layers
    assert lengths[-1] == pytest.approx(max(1, 103.8 / num_stages - 15.8), abs=1)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_the_dearest_stage_is_near_the_mean(num_stages: int):
    found = costs(SUPER, split_stages(SUPER, AUTO, num_stages, 8192, 2), 8192, 2)
    # half of the dearest layer is what a boundary between layers cannot avoid
    assert max(found) - sum(found) / num_stages < layer_flops(SUPER, "E", 8192) / 2


def test_a_last_stage_of_one_layer_leaves_the_others_even():
    stages = split_stages(SUPER, AUTO, 8, 8192, 2)
    *others, last = costs(SUPER, stages, 8192, 2)
    assert len(stages[-1]) == 1
    assert last > max(others)
    assert max(others) - min(others) < 1.5 * layer_flops(SUPER, "E", 8192)


@pytest.mark.parametrize("depths", [0, 2])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_no_split_has_a_cheaper_dearest_stage(num_stages: int, depths: int):
    config = build_config(hybrid_override_pattern="MEM*-EMEM*E")
    size = len(config.hybrid_override_pattern)
    candidates = [
        [range(a, b) for a, b in itertools.pairwise((0, *bounds, size))]
        for bounds in itertools.combinations(range(1, size), num_stages - 1)
    ]
    found = split_stages(config, AUTO, num_stages, 48, depths)
    assert found in candidates
    best = min(max(costs(config, candidate, 48, depths)) for candidate in candidates)
    assert max(costs(config, found, 48, depths)) == best
    # of those as good, none parts fewer pairs
    as_good = [c for c in candidates if max(costs(config, c, 48, depths)) == best]
    fewest = min(letters(config, candidate).count("M|E") for candidate in as_good)
    assert letters(config, found).count("M|E") == fewest


def test_a_pair_stays_together_where_that_costs_nothing():
    # a head dearer than all layers: any bound before the last layer is as good
    config = build_config(hybrid_override_pattern="MEMEMEM", vocab_size=61 * 4096)
    assert letters(config, split_stages(config, AUTO, 3, 32, 0)).count("M|E") == 0


def names(model: HybridLM) -> set[str]:
    return {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}


def cut_in(parts: list[range], **changes: object) -> list[tuple[HybridLM, tuple[str, ...]]]:
    result = []
    for index, layers in enumerate(parts):
        with torch.device("meta"):
            model = HybridLM(build_config(**changes))
        last = index == len(parts) - 1
        result.append((model, cut(model, layers, is_first=index == 0, is_last=last)))
    return result


THREE = [range(2), range(2, 3), range(3, 5)]


def test_stages_hold_every_parameter_once_under_its_name():
    changes = {"num_nextn_predict_layers": 0}
    stages = cut_in(THREE, **changes)
    assert [copies for _, copies in stages] == [(), (), ()]
    parts = [names(model) for model, _ in stages]
    whole = names(HybridLM(build_config(**changes)))
    assert set().union(*parts) == whole
    assert sum(map(len, parts)) == len(whole)
    assert all(name.startswith("backbone.layers.2.") for name in parts[1])


@pytest.mark.parametrize("tied", [False, True])
def test_the_last_stage_has_a_copy_of_the_embedding_where_it_needs_one(tied: bool):
    changes = {"tie_word_embeddings": tied, "num_nextn_predict_layers": int(not tied)}
    (first, _), (middle, _), (last, copies) = cut_in(THREE, **changes)
    assert copies == shared_parameters(last.config) == ("backbone.embeddings.weight",)
    assert names(first) & names(last) == {*copies}
    assert not names(middle) & {*copies}
    assert (last.lm_head.weight is last.backbone.embeddings.weight) == tied


def test_a_stage_draws_the_weights_of_the_whole():
    whole = HybridLM(build_config())
    whole.init_weights(7)
    expected = dict(whole.named_parameters())
    for model, _ in cut_in(THREE):
        model.to_empty(device="cpu")
        model.init_weights(7)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def test_a_single_stage_is_the_model():
    model = build()
    expected = names(model)
    assert cut(model, range(5), is_first=True, is_last=True) == ()
    assert names(model) == expected
