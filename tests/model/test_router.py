import math

import numpy as np
import pytest
import torch

from nemotron.data.batch import Batch, Row, pack
from nemotron.model.router import Router, routers
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from tests.support.models import build, build_config, tokens


def build_router(**changes: object) -> Router:
    generator = torch.Generator().manual_seed(4)
    router = Router(build_config(**changes)).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        router.e_score_correction_bias.copy_(
            0.3 * torch.randn(router.num_experts, generator=generator)
        )
    return router


def draw(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(count, 24, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "top_groups"), [(7, 3, 1, 1), (12, 4, 3, 2), (12, 4, 4, 4)]
)
def test_every_choice_and_weight_follows_the_formulas(
    experts: int, top_k: int, groups: int, top_groups: int, normalize: bool
):
    router = build_router(
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=normalize,
    )
    x = draw(20)
    routing = router(x)
    bias = router.e_score_correction_bias.tolist()
    size, counts = experts // groups, [0] * experts
    for t in range(20):
        scores = [
            1 / (1 + math.exp(-float(x[t] @ router.weight[e].detach()))) for e in range(experts)
        ]
        biased = [s + b for s, b in zip(scores, bias, strict=True)]
        best = [
            sum(sorted(biased[g * size : (g + 1) * size])[-(top_k // top_groups) :])
            for g in range(groups)
        ]
        allowed = sorted(range(groups), key=best.__getitem__)[-top_groups:]
        candidates = [e for e in range(experts) if e // size in allowed]
        chosen = sorted(candidates, key=biased.__getitem__)[-top_k:]
        total = sum(scores[e] for e in chosen) if normalize else 1.0
        expected = {e: 2.5 * scores[e] / total for e in chosen}
        found = dict(zip(routing.experts[t].tolist(), routing.weights[t].tolist(), strict=True))
        assert set(found) == set(expected)
        for e in chosen:
            counts[e] += 1
            assert found[e] == pytest.approx(expected[e], rel=1e-13)
    assert routing.counts.tolist() == counts


def test_scores_are_float32_when_the_model_computes_in_bfloat16():
    router = build_router().float()
    x = draw(50).bfloat16()
    routing = router(x)
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    exact = (x.double() @ router.weight.double().T).sigmoid()
    assert (routing.scores - exact).abs().max() <= 1e-6


def test_the_bias_moves_towards_balance_by_its_rate():
    router = build_router()
    before = router.e_score_correction_bias.clone()
    router.update_bias(torch.tensor([4, 0, 10, 4, 4, 3, 3]), rate=1e-3)  # mean 4
    moved = router.e_score_correction_bias - before
    expected = torch.tensor([0, 1, -1, 0, 0, 1, 1], dtype=torch.float64) * 1e-3
    assert (moved - expected).abs().max() <= 1e-15


def test_the_bias_of_a_model_is_stored_in_float32_and_moves_with_the_counts_of_a_step():
    model = build(dtype=torch.float32)
    batch = Batch(tokens(2, 31), tokens(2, 31, seed=1), None).look_ahead(2)
    _, routing = compute_sums(
        PretrainObjective(Auxiliary(LossConfig(), num_depths=2)), model, batch
    )
    names = [stats.name for stats in routing]
    assert names == ["backbone.layers.1", "mtp.layers.1", "mtp.layers.1"]
    assert [int(stats.counts.sum()) for stats in routing] == [2 * 31 * 3] * 3
    gate = model.get_submodule("backbone.layers.1.mixer.gate")
    before = gate.e_score_correction_bias.clone()
    assert routers(model).keys() == {"backbone.layers.1", "mtp.layers.1"}
    routers(model)["backbone.layers.1"].update_bias(routing[0].counts, rate=0.5)
    signs = torch.sign(routing[0].counts.float().mean() - routing[0].counts)
    assert torch.equal(gate.e_score_correction_bias, before + 0.5 * signs)
    assert gate.e_score_correction_bias.dtype == torch.float32


def test_padding_counts_as_no_expert_s_load_and_costs_no_balance():
    """Rows of whole documents, short ones filled up, beside the same documents alone."""
    model, objective = build(), PretrainObjective(Auxiliary(LossConfig(), num_depths=2))
    ids = tokens(1, 24)[0].numpy()
    rows = [Row(ids[:stop], np.asarray(starts)) for stop, starts in [(24, [0, 9]), (15, [0, 9])]]
    packed = pack(rows, 23, eod_id=2, mask_eod_loss=False).look_ahead(2)
    assert packed.padding is not None
    assert packed.num_tokens == 23 + 15
    sums, routing = compute_sums(objective, model, packed)
    alone = [
        pack([row], min(23, len(row.tokens)), eod_id=2, mask_eod_loss=False).look_ahead(2)
        for row in rows
    ]
    parts = [compute_sums(objective, model, batch) for batch in alone]
    assert [batch.padding for batch in alone] == [None, None]
    for index, stats in enumerate(routing):
        assert torch.equal(stats.counts, sum(part[1][index].counts for part in parts))
    assert (sums - sum(part[0] for part in parts)).abs().max() <= 1e-12 * sums.abs().max()
    counts = sum(objective.counts(batch) for batch in alone)
    assert torch.equal(objective.counts(packed), counts)
    # what fills the row up makes no difference
    packed.input_ids[packed.padding] = 3
    other, again = compute_sums(objective, model, packed)
    # other experts of the padding move rows, which changes the last bits on some CPUs
    assert (other - sums).abs().max() <= 1e-12 * sums.abs().max()
    assert all(torch.equal(a.counts, b.counts) for a, b in zip(again, routing, strict=True))


def test_the_balance_loss_follows_its_formula_and_ignores_the_bias():
    router, rows, length = build_router(), 3, 8
    x = draw(rows * length).requires_grad_()
    found = router.statistics(router(x), rows, "layer").aux_loss_sum
    shares = (x @ router.weight.T).sigmoid()
    shares = shares / shares.sum(-1, keepdim=True)
    expected = torch.zeros((), dtype=torch.float64)
    for row in shares.split(length):
        chosen = row.topk(3).indices
        for e in range(7):
            fraction = int((chosen == e).sum()) / (3 * length)
            expected = expected + length * 7 * fraction * row[:, e].mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-13)
    (ours,) = torch.autograd.grad(found, x)
    (theirs,) = torch.autograd.grad(expected, x)
    assert (ours - theirs).abs().max() <= 1e-14


def test_perfect_balance_costs_exactly_the_coefficient():
    router = build_router(n_routed_experts=6, num_experts_per_tok=2)
    # every token sees one pair of experts a little above the others, each pair equally often
    scores = torch.full((6, 6), 0.5, dtype=torch.float64)
    for t in range(6):
        scores[t, [2 * (t % 3), 2 * (t % 3) + 1]] = 0.5 + 1e-9
    routing = router(draw(6))
    stats = router.statistics(type(routing)(scores, *list(vars(routing).values())[1:]), 1, "x")
    assert stats.aux_loss_sum.item() / 6 == pytest.approx(1.0, abs=1e-8)
