"""Correction in every layout that it allows, and on two processes: the losses of one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.correct.config import CorrectConfig
from nemotron.posttrain.correct.stage import Correction
from nemotron.train.layout import check_layout
from tests.support.cases import mostly_nightly
from tests.support.layout_run import forget_groups
from tests.support.pairs import PairPlace
from tests.support.pool import Pool
from tests.support.tiny_run import PEAK_FLOPS, do_step

pytestmark = pytest.mark.distributed

HEADS = {"heads": ["duration", "edit", "candidate"]}
EXPERTS = {
    "hybrid_override_pattern": "ME*-M",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("tag", {}),
    ("tag", {"tp": 2}),
    ("tag", {"cp": 2}),
    ("tag", {"pp": 2}),
    ("tag", {"ep": 2}),
    ("ctc", {}),
    ("soft", {"ep": 2}),
    ("duration", {}),
]


def steps(values: dict[str, Any]) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Train three steps and evaluate; returns what came out of each step, and the metrics."""
    config = CorrectConfig.model_validate(values)
    ranks = Ranks()
    if dist.is_initialized():
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), grouped=True)
    stage = Correction()
    plan = stage.plan(config)
    check_layout(config, plan, ranks.world)
    setup = stage.build(config, plan, torch.device("cpu"), PEAK_FLOPS, ranks)
    results = [do_step(setup.trainer, step) for step in range(3)]
    assert setup.validate is not None
    metrics = setup.validate()
    forget_groups(setup.trainer)
    return [
        {"loss": r.loss, "norm": r.grad_norm, "tokens": r.tokens, **r.sums.values(r.counts)}
        for r in results
    ], metrics


@pytest.mark.parametrize(
    ("kind", "layout"),
    mostly_nightly(CASES, ("tag", {"tp": 2}), ("soft", {"ep": 2}), ("duration", {})),
    ids=str,
)
def test_losses_and_metrics_are_those_of_one_process(
    pair: Pool, place: PairPlace, kind: str, layout: dict[str, Any]
) -> None:
    heads = HEADS if kind == "duration" else {}
    correction = {"correction": {"candidates": 2, **heads}}
    values = place.values(
        "layout",
        model={**EXPERTS, **correction},
        correct={"kind": kind},
        batch={"micro_batch": 1 if "pp" in layout else 2},
    )
    torch.set_num_threads(1)
    alone, metrics = steps(values)
    found = pair.run(steps, values | {"parallel": layout})
    assert found[0] == found[1]
    # float32 sums in another order
    assert found[0][0][0] == pytest.approx(alone[0], rel=1e-5)
    assert found[0][0][2] == pytest.approx(alone[2], rel=1e-3)
    assert found[0][1] == pytest.approx(metrics, rel=2e-2)
