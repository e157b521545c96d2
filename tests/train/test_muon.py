"""Muon against torch's own, on one matrix, on stacks, in a run that is stopped, and over ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.train.config import MuonConfig, OptimizerConfig
from nemotron.train.muon import is_matrix, orthogonalize
from nemotron.train.optimizer import Optimizer
from nemotron.train.start import train
from tests.support.same_run import assert_same_run, final_tensors
from tests.support.tiny_run import MODEL

CONFIG = ModelConfig.model_validate(MODEL)


@pytest.fixture
def model() -> HybridLM:
    model = HybridLM(CONFIG)
    model.init_weights(3)
    return model


def with_gradients(model: HybridLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_three_steps_are_torchs_muon_on_each_matrix_and_torchs_adamw_on_the_rest(
    model: HybridLM, scale: str, nesterov: bool
):
    named = dict(model.named_parameters())
    chosen = {name for name, p in named.items() if is_matrix(name, p)}
    # stacks come apart into the matrices of experts, which torch's Muon takes one by one
    matrices = {
        name: [torch.nn.Parameter(m.clone()) for m in (p if p.ndim == 3 else p[None]).detach()]
        for name, p in named.items()
        if name in chosen
    }
    others = {
        n: torch.nn.Parameter(p.detach().clone()) for n, p in named.items() if n not in chosen
    }
    muon = torch.optim.Muon(
        [m for stack in matrices.values() for m in stack],
        lr=0.02,
        weight_decay=0.3,
        momentum=0.9,
        nesterov=nesterov,
        adjust_lr_fn=scale,
    )
    decayed = [p for n, p in others.items() if p.ndim > 1 and not n.endswith(".bias")]
    plain = [p for n, p in others.items() if p.ndim == 1 or n.endswith(".bias")]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8)
    settings = MuonConfig(momentum=0.9, nesterov=nesterov, scale=scale)
    own = Optimizer(named, OptimizerConfig(name="muon", muon=settings, weight_decay=0.3))
    for step in range(3):
        with_gradients(model, step)
        for name, stack in matrices.items():
            gradient = named[name].grad
            for row, matrix in zip(
                gradient if gradient.ndim == 3 else [gradient], stack, strict=True
            ):
                matrix.grad = 0.25 * row
        for name, parameter in others.items():
            parameter.grad = 0.25 * named[name].grad
        own.step(0.02, 0.25)
        muon.step()
        adamw.step()
    for name, stack in matrices.items():
        for row, matrix in zip(
            named[name] if named[name].ndim == 3 else [named[name]], stack, strict=True
        ):
            # products of a stack are the same numbers in another kernel: an ulp of bfloat16
            torch.testing.assert_close(row, matrix, rtol=2**-7, atol=0.02 * 2**-7)
    for name, parameter in others.items():
        torch.testing.assert_close(named[name], parameter, rtol=1e-5, atol=1e-6)


def test_embedding_head_convolutions_and_vectors_are_adamws(model: HybridLM):
    rest = {n for n, p in model.named_parameters() if not is_matrix(n, p)}
    assert {"backbone.embeddings.weight", "lm_head.weight"} <= rest
    assert "backbone.layers.0.mixer.conv1d.weight" in rest
    chosen = {n for n, p in model.named_parameters() if is_matrix(n, p)}
    assert "backbone.layers.0.mixer.in_proj.weight" in chosen
    assert "backbone.layers.1.mixer.experts.down_proj" in chosen
    assert not [name for name in chosen if "norm" in name or "conv1d" in name]
    tensors = Optimizer(dict(model.named_parameters()), OptimizerConfig(name="muon")).tensors()
    assert tensors["momentum"].keys() == chosen
    assert tensors["exp_avg"].keys() == rest


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (3, 9, 5)])
def test_singular_values_come_near_one_and_each_of_a_stack_is_alone(shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(x, 5))
    assert 0.5 < values.min() <= values.max() < 1.3
    if x.ndim == 3:
        alone = torch.stack([orthogonalize(matrix, 5) for matrix in x])
        torch.testing.assert_close(orthogonalize(x, 5), alone, rtol=2**-6, atol=2**-8)
    assert orthogonalize(torch.empty(0, 4), 5).shape == (0, 4)


def test_a_stopped_run_ends_with_the_same_bits_and_another_than_adamws(recipe):
    settings: dict[str, Any] = {"optimizer": {"name": "muon"}}
    whole, stopped, other = (
        recipe("whole", **settings),
        recipe("stopped", **settings),
        recipe("other"),
    )
    assert train(whole) == 0
    assert train(stopped, stop_at=3) == 75
    assert train(stopped, resume=True) == 0
    folder = Path(whole.output)
    assert_same_run(folder / "stopped", folder / "whole")
    tensors = final_tensors(folder / "whole")
    assert "optimizer.momentum.backbone.layers.0.mixer.in_proj.weight" in tensors
    assert "optimizer.exp_avg.backbone.layers.0.mixer.in_proj.weight" not in tensors
    assert "optimizer.exp_avg.lm_head.weight" in tensors
    assert train(other) == 0
    differing = final_tensors(folder / "other")["model.backbone.layers.0.mixer.in_proj.weight"]
    assert not torch.equal(differing, tensors["model.backbone.layers.0.mixer.in_proj.weight"])
