"""Weights prepared for decoding compute what the masters do."""

import copy

import pytest
import torch

from nemotron.generate.engine import Engine
from nemotron.generate.weights import FEW_TOKENS, prepare_weights
from nemotron.model.hybrid import HybridLM

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
