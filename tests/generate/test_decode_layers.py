"""Weights prepared for decoding compute what the masters do."""

import copy

import pytest
import torch

from nemotron.generate.decode_layers import FEW_TOKENS, FewTokensMoE, prepare_weights
from nemotron.generate.engine import Engine
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.moe import MoE

PROMPTS = [[5, 3, 60, 1, 17, 17, 2], [9, 4]]


def continued_logits(model: HybridLM, prompts: list[list[int]]) -> torch.Tensor:
    engine = Engine(model)
    cache, logits = engine.prefill(prompts)
    results = [logits]
    for token in (7, 8, 9):
        results.append(engine.advance(cache, torch.full((len(prompts),), token)))
    return torch.stack(results).float()


@pytest.mark.parametrize("copies", [1, FEW_TOKENS + 1])
def test_prepared_weights_give_the_same_logits(model: HybridLM, copies: int) -> None:
    prompts = PROMPTS * copies  # few and many rows go through the experts differently
    expected = continued_logits(model, prompts)
    prepared = continued_logits(prepare_weights(copy.deepcopy(model)), prompts)
    # float32: another order of sums
    assert (prepared - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_bf16_weights_are_cast_once_and_stay_close(model: HybridLM) -> None:
    model = copy.deepcopy(model)
    expected = continued_logits(model, PROMPTS)
    model.compute_dtype = torch.bfloat16
    cast_each_time = continued_logits(model, PROMPTS)
    prepared = continued_logits(prepare_weights(model), PROMPTS)
    # both round at every layer, not at the same places: neither may be further from float32
    scale = expected.abs().max()
    assert (cast_each_time - expected).abs().max() <= 0.05 * scale
    assert (prepared - expected).abs().max() <= 0.05 * scale


def test_decay_norms_and_router_stay_float32(model: HybridLM) -> None:
    model = copy.deepcopy(model)
    model.compute_dtype = torch.bfloat16
    prepare_weights(model)
    kept = {name.rsplit(".", 2)[-1] for name, p in model.named_parameters() if p.ndim == 1}
    assert {"A_log", "D", "dt_bias"} <= kept
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or ".gate." in name:
            assert parameter.dtype == torch.float32, name


def test_float64_is_left_as_it_is(model: HybridLM) -> None:
    double = copy.deepcopy(model).double()
    expected = continued_logits(copy.deepcopy(double), PROMPTS)
    assert continued_logits(prepare_weights(double), PROMPTS).equal(expected)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS])
@pytest.mark.parametrize(("shared", "included"), [(12, True), (36, True), (20, False)])
@torch.no_grad()
def test_a_shared_expert_goes_along_where_it_can(shared: int, included: bool, tokens: int) -> None:
    sizes = {"hidden_size": 16, "n_routed_experts": 5, "num_experts_per_tok": 2}
    config = ModelConfig(
        vocab_size=8,
        hybrid_override_pattern="E",
        moe_intermediate_size=12,
        moe_shared_expert_intermediate_size=shared,
        **sizes,
    )
    moe = MoE(config).double()
    for index, parameter in enumerate(moe.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    x = torch.randn(1, tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected = moe(x)[0]
    few = FewTokensMoE(moe)
    assert few.includes_shared == included
    # float64: another order of sums
    assert (few(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    # the weights, laid out anew, still serve many tokens
    assert (
        few(x.repeat(1, 9, 1))[:, :tokens] - expected
    ).abs().max() <= 1e-12 * expected.abs().max()
