"""Experts by language: published numbers, the gate's gradient, and balance inside each group."""

import pytest
import torch
import torch.nn.functional as F

from nemotron.errors import UserError
from nemotron.generate.decode_layers import prepare_weights
from nemotron.generate.forward import append, new_cache
from nemotron.loading import fix_language
from nemotron.model.cached_rows import CachedRows
from nemotron.model.config import LanguageExpertsConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.language import LanguageExperts, Languages
from nemotron.model.router import Router, RoutingStats
from tests.support.models import build, build_config, gradients, recompute, tokens

EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "mtp_hybrid_override_pattern": None,
}
TWO = {"language_experts": {"languages": ["yue", "en"]}}


def bilingual(**experts: object) -> HybridLM:
    own = {"languages": ["yue", "en"], "linear": True, **experts}
    return build(hybrid_override_pattern="ME*E", **EXPERTS, language_experts=own)


def golden_router() -> Router:
    router = Router(build_config(hidden_size=2, **EXPERTS, **TWO)).double()
    with torch.no_grad():
        rows = [[1.0, 0], [0, 1], [1, 1], [-1, 0]]
        router.weight.copy_(torch.tensor(rows, dtype=torch.float64))
    return router


X = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
GATE = torch.tensor([[0.2, 1.2]], dtype=torch.float64)


def gate(**experts: object) -> LanguageExperts:
    own = {"languages": ["yue", "en"], **experts}
    return LanguageExperts(LanguageExpertsConfig.model_validate(own), 2, 1)


def test_the_gate_chooses_the_group_and_weighs_its_experts() -> None:
    router, choice = golden_router(), gate().choice(GATE)
    assert choice.shares[0].tolist() == pytest.approx([0.268941, 0.731059], abs=1e-6)
    hard = router(X, gate(soft=False).choice(GATE))
    assert hard.experts[0].tolist() in ([2, 3], [3, 2])
    assert hard.weights[0].tolist() == pytest.approx([1.25, 1.25])
    soft = router(X, choice)
    assert soft.weights[0].tolist() == pytest.approx([0.913823] * 2, abs=1e-6)
    plain = router(X)
    assert plain.experts[0].tolist() in ([0, 1], [1, 0])
    # 2.5 times the shares of scores 0.622459 and 0.268941
    assert plain.weights[0].tolist() == pytest.approx([1.745734, 0.754266], abs=1e-6)


def test_a_known_language_decides_unscaled() -> None:
    choice = gate().choice(GATE, torch.tensor([0]))
    found = golden_router()(X, choice)
    assert found.weights[0].tolist() == pytest.approx([1.745734, 0.754266], abs=1e-6)
    unknown = golden_router()(X, gate().choice(GATE, torch.tensor([-1])))
    assert unknown.weights[0].tolist() == pytest.approx([0.913823] * 2, abs=1e-6)


def test_the_bias_is_updated_within_groups() -> None:
    router = golden_router()
    loads = torch.tensor([10, 2, 1, 1])
    router.update_bias(loads, 0.1)
    assert router.e_score_correction_bias.tolist() == pytest.approx([-0.1, 0.1, 0, 0])
    alone = Router(build_config(hidden_size=2, **EXPERTS)).double()
    alone.update_bias(loads, 0.1)
    assert alone.e_score_correction_bias.tolist() == pytest.approx([-0.1, 0.1, 0.1, 0.1])


def test_linear_experts_are_weighted_by_the_gate() -> None:
    experts = gate(linear=True).double()
    assert experts.linear is not None
    with torch.no_grad():
        matrices = [[[0.0, 1], [1, 0]], [[1, 0], [0, -1]]]
        experts.linear.copy_(torch.tensor(matrices, dtype=torch.float64))
    hidden = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    found = experts.add_linear(hidden, experts.choice(GATE))
    assert found[0, 0].tolist() == pytest.approx([2.268941, 0.806824], abs=1e-6)


@pytest.mark.parametrize(("label", "loss"), [(0, 1.313262), (1, 0.313262)])
def test_the_gates_loss_is_cross_entropy_over_known_tokens(label: int, loss: float) -> None:
    experts = gate().double()
    hidden = torch.tensor([[[3.0, -3.0], [1.0, 1.0]]], dtype=torch.float64)  # normalized: 1, -1
    with torch.no_grad():
        experts.gate.copy_(torch.tensor([[0.1, -0.1], [0.6, -0.6]], dtype=torch.float64))
    known = Languages(torch.tensor([[label, -1]]))
    _, found = experts.choose(hidden, known)
    assert found is not None
    assert found.item() == pytest.approx(loss, abs=1e-4)  # of the norm's epsilon


def test_a_model_routes_each_token_to_the_experts_of_one_language() -> None:
    model = bilingual()
    ids = tokens(2, 11)
    labels = torch.randint(-1, 2, ids.shape, generator=torch.Generator().manual_seed(1))
    for decide in (False, True):
        routing: list[RoutingStats] = []
        model(ids, routing=routing, languages=Languages(labels, decide))
        sizes = [stats.counts.view(2, 2).sum(1).tolist() for stats in routing]
        assert sizes[0] == sizes[1]  # all layers share the gate's choice
        if decide:
            known = [int((labels == language).sum()) for language in (0, 1)]
            assert all(size >= 2 * own for size, own in zip(sizes[0], known, strict=True))
    assert routing[0].language_loss_sum is not None
    assert routing[1].language_loss_sum is None


def test_the_loss_of_the_text_reaches_the_gate_through_the_weights() -> None:
    for soft in (True, False):
        model = bilingual(soft=soft, linear=False)
        found = gradients(model, model(tokens(2, 9)).square().sum())
        assert ("language.gate" in found and bool(found["language.gate"].any())) is soft


def test_recomputed_blocks_have_the_same_gradients() -> None:
    model, ids = bilingual(), tokens(2, 9)
    plain = gradients(model, model(ids).square().sum())
    recompute(model, True)
    again = gradients(model, model(ids).square().sum())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=0)


def test_the_balance_loss_of_groups_is_that_of_two_routers() -> None:
    router = Router(build_config(**EXPERTS, **TWO)).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, dtype=torch.float64))
    x = torch.randn(10, 24, dtype=torch.float64)
    group = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 0, 1])
    choice = gate().choice(F.one_hot(group, 2).double(), group)
    found = router.statistics(router(x, choice), 2, "x").aux_loss_sum.item()
    expected = 0.0
    for row in (slice(0, 5), slice(5, 10)):
        for number in (0, 1):
            own = x[row][group[row] == number]
            scores = (own @ router.weight[2 * number : 2 * number + 2].T).sigmoid()
            share = scores / scores.sum(1, keepdim=True)
            # both experts of a group are chosen, so each has half of its load
            expected += 2 * len(own) * (0.5 * share.mean(0)).sum().item()
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_cached_model_prepared_for_decoding_answers_as_in_training() -> None:
    model, ids = bilingual().float(), tokens(1, 14)
    model.compute_dtype = torch.float32
    with torch.no_grad():
        expected = model.logits(model(ids))[:, -1]
        cache = new_cache(prepare_weights(model), 1)
        rows = CachedRows(cache, [cache.admit()])
        for piece in ids.split([9, 3, 1, 1], 1):
            found = append(model, rows, piece)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_group": 4, "num_experts_per_tok": 1}, "write 2"),
        ({"topk_group": 2}, "write 1"),
        ({"language_experts": {"languages": ["en", "en"]}}, "twice"),
        ({"hybrid_override_pattern": "M*"}, "needs an E layer"),
        ({"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*"}, "write 0"),
    ],
)
def test_a_mistake_names_both_numbers_or_what_to_write(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_config(**(EXPERTS | TWO | changes))


def test_a_fixed_language_reads_all_tokens_as_a_label_would() -> None:
    model, ids = bilingual(), tokens(2, 9)
    assert model.language is not None
    expected = model(ids, languages=Languages(torch.ones_like(ids), decide=True))
    by_gate = model(ids)
    fix_language(model, "en")
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)
    assert not torch.equal(by_gate, expected)
    with pytest.raises(UserError, match="is none of the model's languages; use yue or en"):
        fix_language(model, "fr")
    with pytest.raises(UserError, match="has no experts by language"):
        fix_language(build(hybrid_override_pattern="M*"), "en")
