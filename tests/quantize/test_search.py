"""The best formats at a budget against trying out every choice; scores against their definition."""

import itertools

import numpy as np
import pytest
import torch

from nemotron.errors import UserError
from nemotron.precision.fixed_scales import round_input, round_weight
from nemotron.precision.static import ModelScales, attach, detach
from nemotron.quantize.calibrate import calibrate
from nemotron.quantize.groups import Group, find_groups
from nemotron.quantize.presets import quantizable
from nemotron.quantize.scales import model_scales
from nemotron.quantize.search import search
from nemotron.quantize.sensitivity import fisher_scores, kl_scores
from nemotron.quantize.solver import Frontier, Option
from tests.quantize.test_calibration import LAYER, batches, small


def random_groups(seed: int, number: int) -> list[list[Option]]:
    """Return options some of which are dominated, and many of which cost the same together."""
    random = np.random.default_rng(seed)
    sizes = random.choice([1, 2, 3, 7, 40], size=number)
    return [
        [
            Option(9 * int(size), float(random.lognormal(0, 2))),
            Option(16 * int(size), float(random.lognormal(-2, 2))),
            Option(32 * int(size), 0.0),
        ]
        for size in sizes
    ]


@pytest.mark.parametrize("seed", range(12))
def test_the_frontier_is_what_trying_out_every_choice_finds(seed: int):
    groups = random_groups(seed, number=seed % 8 + 1)
    frontier = Frontier(groups)
    every = [
        (sum(o.cost for o in choice), sum(o.loss for o in choice))
        for choice in itertools.product(*groups)
    ]
    costs = sorted({cost for cost, _ in every})
    for budget in [*costs, costs[0] + 0.5, costs[-1] + 5]:
        best = min(loss for cost, loss in every if cost <= budget)
        place = frontier.within(int(budget))
        assert frontier.losses[place] == pytest.approx(best, abs=1e-12)
        chosen = [group[i] for group, i in zip(groups, frontier.choice(place), strict=True)]
        assert sum(option.cost for option in chosen) == frontier.costs[place] <= budget
        assert sum(option.loss for option in chosen) == pytest.approx(best, abs=1e-12)
    assert frontier.within(costs[0] - 1) is None
    assert (np.diff(frontier.costs) > 0).all()
    assert (np.diff(frontier.losses) < 0).all()


def test_a_cost_may_count_the_experts_of_one_token_alone():
    model = small()
    every, active = (
        {g.name: g for g in find_groups(model, cost)} for cost in ("weights", "active")
    )
    experts = [name for name in every if name.endswith("experts")]
    assert experts
    for name, group in every.items():
        share = 6 if name in experts else 1  # 2 of 12 experts are chosen
        assert group.weights == share * active[name].weights
    # experts are then cheap, so that they are the last to lose bits
    losses = {"nvfp4": 2.0, "fp8": 1.0}
    scores = dict.fromkeys(every, losses)
    found = {
        cost: search(list(groups.values()), scores, 8.0).groups
        for cost, groups in (("weights", every), ("active", active))
    }
    bits = {"nvfp4": 4.5, "fp8": 8, "bf16": 16}
    assert all(bits[found["active"][n]] >= bits[found["weights"][n]] for n in experts)
    assert any(bits[found["active"][n]] > bits[found["weights"][n]] for n in experts)


def test_groups_are_what_engines_fuse_and_all_experts_of_a_layer():
    model = small(hidden_size=40)
    groups = {group.name: group for group in find_groups(model)}
    assert groups[f"{LAYER}.2.mixer.qkv_proj"].layers == tuple(
        f"{LAYER}.2.mixer.{part}_proj" for part in "qkv"
    )
    assert groups[f"{LAYER}.1.mixer.experts"].weights == 2 * 12 * 16 * 16
    assert sorted(name for g in groups.values() for name in g.layers) == sorted(quantizable(model))
    # 40 values are not whole blocks
    assert groups[f"{LAYER}.0.mixer.in_proj"].formats == ("fp8", "bf16")
    assert groups[f"{LAYER}.0.mixer.out_proj"].formats == ("nvfp4", "fp8", "bf16")


def test_a_search_keeps_to_its_budget_and_says_what_is_too_small():
    groups = [Group(name, (name,), 100, ("nvfp4", "fp8", "bf16")) for name in "abc"]
    scores = {
        "a": {"nvfp4": 5.0, "fp8": 1.0},
        "b": {"nvfp4": 3.0, "fp8": 0.2},
        "c": {"nvfp4": 0.1, "fp8": 0.05},
    }
    found = search(groups, scores, (8 + 8 + 4.5) / 3)
    assert found.groups == {"a": "fp8", "b": "fp8", "c": "nvfp4"}
    assert found.table == found.groups
    assert found.chosen.bits == pytest.approx((8 + 8 + 4.5) / 3)
    assert found.chosen.score == pytest.approx(1.3)
    assert found.curve[0].bits == 4.5
    assert found.curve[-1].score == 0
    assert search(groups, scores, 16).table == {}
    assert search(groups, scores, 4.5).groups == dict.fromkeys("abc", "nvfp4")
    with pytest.raises(UserError, match=r"give at least 4\.5 "):
        search(groups, scores, 4.4)


def choices(model):
    observed = calibrate(model, batches())
    names = quantizable(model)
    return {
        format: model_scales(model, dict.fromkeys(names, format), observed)
        for format in ("nvfp4", "fp8")
    }


def test_scores_by_gradient_are_those_of_the_definition():
    model = small()
    model.requires_grad_(False)
    both, groups = choices(model), find_groups(model)
    found = fisher_scores(model, groups, both, batches())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    name = f"{LAYER}.0.mixer.out_proj"
    module = model.get_submodule(name)
    for format, scales in both.items():
        own, total = scales.linears[name], 0.0
        for batch in batches():
            seen = {}

            def watch(_, inputs, output, seen=seen):
                seen["x"], seen["y"] = inputs[0], output.requires_grad_()
                output.retain_grad()

            hook = module.register_forward_hook(watch)
            loss = model.lm_head.loss(model(batch.input_ids), batch.labels) / 18
            loss.backward()
            hook.remove()
            rows = seen["x"].flatten(0, 1)
            y = round_input(rows, own) @ round_weight(module.weight, own).T
            change = y.view_as(seen["y"]) - seen["y"].detach()
            total += (seen["y"].grad * change).square().sum().item()
        assert found[name][format] == pytest.approx(total, rel=1e-4)
    assert found[name]["nvfp4"] > found[name]["fp8"] > 0
    qkv = found[f"{LAYER}.2.mixer.qkv_proj"]
    assert 0 < qkv["fp8"] < qkv["nvfp4"]
    assert found[f"{LAYER}.1.mixer.experts"]["nvfp4"] > 0


def test_scores_by_divergence_are_of_one_group_at_a_time():
    model = small()
    both, groups = choices(model), find_groups(model)
    found = kl_scores(model, groups, both, batches())
    assert all("forward" not in vars(module) for module in model.modules())
    name = f"{LAYER}.1.mixer.experts"
    alone = ModelScales({k: v for k, v in both["nvfp4"].linears.items() if k.startswith(name)})
    wanted = 0.0
    with torch.no_grad():
        for batch in batches():
            p = model.logits(model(batch.input_ids)).log_softmax(-1)
            attach(model, alone, rounds_weights=True)
            q = model.logits(model(batch.input_ids)).log_softmax(-1)
            detach(model)
            wanted += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
    assert found[name]["nvfp4"] == pytest.approx(wanted, rel=1e-4)
    assert len({value for one in found.values() for value in one.values()}) == 2 * len(groups)
