"""Weights prepared for decoding compute what the masters do."""

import copy

import pytest
import torch

from nemotron.generate.decode_layers import decode_view, prepare_weights
from nemotron.generate.engine import Engine
from nemotron.generate.expert_layers import FEW_TOKENS, FewTokensMoE
from nemotron.generate.forward import append, read
from nemotron.generate.sampling import Sampling
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.moe import MoE

PROMPTS = [[5, 3, 60, 1, 17, 17, 2], [9, 4]]


def continued_logits(model: HybridLM, prompts: list[list[int]]) -> torch.Tensor:
    rows, logits = read(model, prompts)
    results = [logits]
    for token in (7, 8, 9):
        results.append(append(model, rows, torch.full((len(prompts), 1), token)))
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


def train(model: HybridLM, optimizer: torch.optim.Optimizer, seed: int) -> float:
    ids = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(seed))
    logits = model.logits(model(ids[:, :-1]))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("pack", [False, True])
def test_a_model_that_a_view_generated_with_trains_on_as_if_it_had_not(
    model: HybridLM, pack: bool
) -> None:
    models = [copy.deepcopy(model) for _ in range(2)]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in models]
    names = [name for name, _ in models[1].named_parameters()]
    view = decode_view(models[1], pack=pack)
    for step in range(3):
        expected, found = (train(m, o, step) for m, o in zip(models, optimizers, strict=True))
        assert expected == found
        Engine(view).generate(PROMPTS, 3, Sampling(1.0, seed=step))
    assert [name for name, _ in models[1].named_parameters()] == names
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert other.requires_grad
        assert one.equal(other)


def test_a_view_has_the_parameters_and_so_the_newest_weights(model: HybridLM) -> None:
    model = copy.deepcopy(model)
    view, packed = decode_view(model), decode_view(model, pack=True)
    parameters = dict(model.named_parameters())
    assert all(parameter is parameters.pop(name) for name, parameter in view.named_parameters())
    assert not parameters
    before = continued_logits(packed, PROMPTS)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    expected = continued_logits(model, PROMPTS)
    scale = expected.abs().max()
    # float32: another order of sums
    assert (continued_logits(view, PROMPTS) - expected).abs().max() <= 1e-5 * scale
    assert (before - expected).abs().max() > 1e-3 * scale
    assert continued_logits(packed, PROMPTS).equal(before)
