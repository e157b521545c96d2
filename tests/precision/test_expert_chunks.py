"""Experts that are quantized some at a time: the same numbers, and less at once."""

from pathlib import Path

import pytest
import torch

from nemotron.model.hybrid import HybridLM
from nemotron.precision import groups
from nemotron.precision.apply import Quantization
from nemotron.precision.config import PrecisionConfig
from nemotron.precision.groups import expert_chunks
from nemotron.precision.linear import quantized_grouped_linear
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import NVFP4Scheme
from nemotron.recipe.load import load_recipe
from tests.support.cases import further

ROOT = Path(__file__).parents[2]


def test_chunks_are_all_experts_and_their_rows_in_order(monkeypatch):
    monkeypatch.setitem(groups.AT_ONCE, "cpu", 250)
    cut = expert_chunks((3, 0, 4, 1, 2), torch.empty(5, 10, 10))
    assert [chunk.sizes for chunk in cut] == [(3, 0), (4, 1), (2,)]
    assert [chunk.experts for chunk in cut] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [chunk.rows for chunk in cut] == [slice(0, 3), slice(3, 8), slice(8, 10)]
    assert len(expert_chunks((3, 0, 4), torch.empty(3, 10, 100))) == 3, (
        "one at least, however large"
    )


def two_steps(preset: str) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Return what quantizing may change in two steps of two micro-batches each, and metrics."""
    model = HybridLM(load_recipe(ROOT / "recipes/tiny/smoke.yaml").config.model)
    model.init_weights(1)
    model.compute_dtype = torch.bfloat16
    settings = {"compute": "bf16", "preset": preset, "observe_every_steps": 1}
    quantization = Quantization(model, PrecisionConfig.model_validate(settings), seed=3)
    found = []
    for step in range(2):
        for first in (0, 64):
            quantization.begin(step, first)
            hidden = model(torch.arange(first, first + 64).view(2, 32))
            hidden.float().square().sum().backward()
            found.append(hidden.detach())
    quantization.begin(2, 0)
    found += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    found += [tensor.clone() for tensor in quantization.tensors().values()]
    return found, quantization.metrics()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nvfp4_all", further("fp8_delayed"), further("mxfp8")])
def test_a_model_computes_the_same_with_one_expert_at_a_time(monkeypatch, preset: str):
    whole, figures = two_steps(preset)
    monkeypatch.setitem(groups.AT_ONCE, "cpu", 1)
    parts, others = two_steps(preset)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert figures.keys() == others.keys()
    for name, figure in figures.items():
        # sums of squares in float64, in another order
        assert others[name] == pytest.approx(figure, rel=1e-12), name


def test_no_more_than_the_limit_is_quantized_at_once(monkeypatch):
    seen: list[tuple[str, int]] = []

    class Counted(NVFP4Scheme):
        def quantize(self, operand, tensor, *args, **kwargs):
            seen.append((operand, tensor.numel()))
            return super().quantize(operand, tensor, *args, **kwargs)

    monkeypatch.setitem(groups.AT_ONCE, "cpu", 2 * 64 * 32)
    x, weight = torch.randn(50, 32, requires_grad=True), torch.randn(5, 64, 32, requires_grad=True)
    counts = torch.tensor([10, 0, 0, 0, 40])
    quantized_grouped_linear(x, weight, counts, Counted(), Draw(1)).sum().backward()
    assert [size for operand, size in seen if operand == "w"] == [4096, 4096, 2048]
    assert [size for operand, size in seen if operand == "x"] == [320, 0, 1280]
    assert [size for operand, size in seen if operand == "dy"] == [640, 0, 2560]
