"""The figures of quantizing, against their definitions, and as a run logs them."""

from pathlib import Path

import torch

from nemotron.model.hybrid import HybridLM
from nemotron.precision.apply import Quantization
from nemotron.precision.config import PrecisionConfig
from nemotron.precision.schemes import SCHEMES
from nemotron.precision.telemetry import Telemetry
from nemotron.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]


def figures(tensor: torch.Tensor, scheme: str = "nvfp4") -> dict[str, float]:
    telemetry = Telemetry()
    telemetry.observe("layer", "x", tensor, SCHEMES[scheme].quantize("x", tensor)[0].operand())
    found = telemetry.take()
    assert not telemetry.take()
    return {name.rpartition("/")[2]: value for name, value in found.items()}


def test_numbers_that_the_format_has_are_not_changed():
    row = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -6, -4, -3, -2, -1.5, -1, -0.5, 0])
    tensor = torch.cat([row * 448, row]).view(1, 32)
    # a scale of 448 and one of 1 under a global scale of 1: nothing is rounded
    assert figures(tensor) == {
        "amax": 2688.0, "underflow": 0.0, "dead": 0.0, "saturation": 0.0, "error": 0.0
    }  # fmt: skip


def test_what_is_lost_at_either_end_is_counted():
    block = torch.tensor([[6.0, *[0.2] * 3, *[0.0] * 4, *[3.0] * 8]]) * 448
    found = figures(block)
    assert found["underflow"] == 3 / 12
    assert found["dead"] == 0
    assert found["saturation"] == 0
    assert abs(found["error"] - (3 * 0.2**2 / (36 + 3 * 0.04 + 72)) ** 0.5) < 1e-6
    # a block whose scale is rounded down cannot reach its largest number
    second = torch.cat([block, torch.full((1, 16), 6.0 * 16.8)])
    assert figures(second)["saturation"] == 16 / 28
    # one over 458752 is the largest share of a tensor's magnitude at which a block's scale is zero
    third = torch.cat([block, torch.full((1, 16), 6.0 * 448 / 458752)])
    assert figures(third)["dead"] == 16 / 28
    assert figures(third)["underflow"] == 19 / 28
    assert figures(torch.tensor([[448.0, 1.0]]), "fp8_current")["saturation"] == 0


def test_every_layer_of_a_model_is_measured_and_no_number_changes():
    config = load_recipe(ROOT / "recipes/tiny/smoke.yaml").config.model
    results = []
    for every in (None, 2):
        model = HybridLM(config)
        model.init_weights(1)
        model.compute_dtype = torch.bfloat16
        settings = {"compute": "bf16", "preset": "nvfp4_all", "observe_every_steps": every}
        quantization = Quantization(model, PrecisionConfig.model_validate(settings), seed=1)
        quantization.begin(1, 0)
        hidden = model(torch.arange(64).view(2, 32))
        hidden.float().square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((hidden.detach(), gradients))
        found = quantization.metrics()
        if every is None:
            assert not found
    layers = {line.module for line in quantization.table if not line.module.startswith("mtp.")}
    measured = {name.rsplit("/", 2)[0].removeprefix("precision/") for name in found}
    assert measured == {layer.removeprefix("backbone.") for layer in layers}
    assert {name.split("/")[-2] for name in found} == {"x", "w", "dy"}
    errors = [value for name, value in found.items() if name.endswith("error")]
    assert all(0.02 < error < 0.2 for error in errors)
    quantization.begin(2, 0)
    model(torch.arange(64).view(2, 32))
    assert not quantization.metrics()
    (a, grads_a), (b, grads_b) = results
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(grads_a, grads_b, strict=True))
