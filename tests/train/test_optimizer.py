"""AdamW's groups, norms and clipping against torch's own functions."""

import copy

import pytest
import torch
from torch import nn

from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.train.config import OptimizerConfig
from nemotron.train.kinds import kinds, parameter_kinds
from nemotron.train.optimizer import (
    AdamW,
    GradientNorms,
    Optimizer,
    clip_coefficient,
    decays,
    squares_by_kind,
)
from tests.support.tiny_run import MODEL

CONFIG = ModelConfig.model_validate(MODEL)


@pytest.fixture
def model() -> HybridLM:
    model = HybridLM(CONFIG)
    model.init_weights(3)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def test_vectors_and_biases_are_not_decayed_but_convolution_and_router_are(model):
    undecayed = {n.rsplit("mixer.", 1)[-1] for n, p in model.named_parameters() if not decays(n, p)}
    assert {"A_log", "D", "dt_bias", "norm.weight", "conv1d.bias"} <= undecayed
    decayed = {n for n, p in model.named_parameters() if decays(n, p)}
    assert "backbone.layers.0.mixer.conv1d.weight" in decayed
    assert "backbone.layers.1.mixer.gate.weight" in decayed
    assert {"backbone.embeddings.weight", "lm_head.weight"} <= decayed
    assert not any("norm" in name for name in decayed)


def norms_of(gradients: dict[str, torch.Tensor]) -> GradientNorms:
    names = kinds(CONFIG)
    return GradientNorms(
        squares_by_kind(gradients, parameter_kinds(gradients, CONFIG), names), names
    )


def test_a_step_is_torchs_adamw_after_torchs_clipping(model):
    expected = copy.deepcopy(model)
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        other.grad = own.grad.clone()
    config = OptimizerConfig(weight_decay=0.3, clip=0.7)
    optimizer = Optimizer(dict(model.named_parameters()), config)
    norm = norms_of(optimizer.gradients()).total().item()
    optimizer.step(0.01, clip_coefficient(norm, config.clip))

    reference_norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.7)
    assert norm == pytest.approx(reference_norm.item(), rel=1e-5)
    groups = [
        {
            "params": [p for n, p in expected.named_parameters() if decays(n, p) is decayed],
            "weight_decay": 0.3 if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    torch.optim.AdamW(groups, lr=0.01, betas=config.betas, eps=config.eps, fused=False).step()
    for (name, own), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        # the fused kernel rounds in another order
        torch.testing.assert_close(own, other, rtol=2e-6, atol=2e-6, msg=name)


def test_norms_by_kind_cover_every_parameter_once(model):
    gradients = {n: p.grad for n, p in model.named_parameters()}
    by_kind = norms_of(gradients).by_kind()
    names = {"embed", "mamba", "attention", "router", "experts", "shared", "latent", "mlp"}
    assert set(by_kind) == names | {"head", "mtp"}
    total = norms_of(gradients).total().item()
    assert sum(norm**2 for norm in by_kind.values()) == pytest.approx(total**2, rel=1e-5)
    experts = [
        p.grad.norm() ** 2
        for n, p in model.named_parameters()
        if n.startswith("backbone.layers.1.mixer.experts")
    ]
    assert by_kind["experts"] == pytest.approx(sum(experts).item() ** 0.5, rel=1e-5)


def test_a_small_gradient_is_left_alone():
    assert clip_coefficient(0.9, 1.0) == 1.0
    assert clip_coefficient(4.0, 1.0) == pytest.approx(0.25)
    assert clip_coefficient(4.0, None) == 1.0


def test_the_moments_exist_before_the_first_step(model):
    optimizer = Optimizer(dict(model.named_parameters()), OptimizerConfig())
    tensors = optimizer.tensors()
    names = {name for name, _ in model.named_parameters()}
    assert tensors.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(named.keys() == names for named in tensors.values())
    optimizer.step(0.1)
    assert tensors["step"]["lm_head.weight"].item() == 1


@pytest.mark.parametrize("coefficient", [1.0, 0.3])
def test_adamw_has_the_bits_of_torchs(coefficient: float):
    torch.manual_seed(3)
    shapes = {"a.weight": (5, 7), "b.bias": (6,), "c.weight": (3, 4, 2), "unused": (4,)}
    parameters = {name: torch.randn(shape) for name, shape in shapes.items()}
    decays = {"a.weight": 0.1, "b.bias": 0.0, "c.weight": 0.1, "unused": 0.0}
    theirs = {name: nn.Parameter(tensor.clone()) for name, tensor in parameters.items()}
    groups = [{"params": [theirs[name]], "weight_decay": decays[name]} for name in shapes]
    peer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    ours = AdamW(parameters, decays, (0.9, 0.95), 1e-8)
    for step in range(5):
        gradients = {n: torch.randn(t.shape) for n, t in parameters.items() if n != "unused"}
        for name, gradient in gradients.items():
            theirs[name].grad = gradient * coefficient if coefficient < 1 else gradient.clone()
        for group in peer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        peer.step()
        ours.step(gradients, 0.01 * (step + 1), coefficient)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, theirs[name]), name
        for key, values in peer.state[theirs[name]].items():
            assert torch.equal(ours.state[key][name], values), (name, key)
