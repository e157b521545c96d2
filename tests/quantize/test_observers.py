"""Scales and stored values against a search in float64 over tables, and against golden vectors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemotron.precision.fixed_scales import (
    round_fp8,
    round_input,
    round_weight,
    stack,
)
from nemotron.precision.nvfp4 import BLOCK
from nemotron.precision.scales import LinearScales
from nemotron.precision.stored import factors_of, quantize_weight
from nemotron.quantize.observers import weight_scales

GOLDEN = Path(__file__).parents[1] / "precision" / "golden"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])
# bits s eeee mmm with bias 7: 1 to 126 are all positive finite numbers
E4M3 = np.array(
    [
        m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16)
        for m in range(8)
    ]
)[1:127]


def block_errors(block: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """Return the squared error of 16 values for each scale, each value at its nearest code."""
    grid = np.atleast_1d(scale)[:, None] * E2M1
    return (np.abs(block[None, :, None] - grid[:, None, :]).min(-1) ** 2).sum(-1)


def error(weight: Tensor, scales: LinearScales) -> np.ndarray:
    """Return the squared error of each block."""
    narrow = weight
    difference = (round_weight(weight, scales).double() - narrow.double()).square()
    return difference.view(weight.shape[0], -1, BLOCK).sum(-1).numpy()


def weights(case: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(6, 48, generator=generator)
    if case == "heavy":
        return normal / torch.randn(6, 48, generator=generator)
    if case == "zeros":
        normal[1], normal[:, 16:32] = 0, 0
    if case == "faint blocks":
        normal[:, :16] *= 1e-6
    return normal * 0.03


CASES = ("normal", "heavy", "zeros", "faint blocks")


@pytest.mark.parametrize("case", CASES)
def test_the_sweep_finds_what_an_exhaustive_search_finds(case: str):
    weight = weights(case)
    scales = weight_scales(weight, "nvfp4", "mse")
    outer = scales.weight_scale_2.double().item()
    narrow = weight.double().view(6, -1, BLOCK).numpy()
    found = error(weight, scales)
    for row in range(6):
        for column in range(3):
            best = block_errors(narrow[row, column], E4M3 * outer).min()
            # the arithmetic of the stored form is float32, the search float64
            assert found[row, column] == pytest.approx(best, rel=1e-5, abs=1e-18)


@pytest.mark.parametrize("case", CASES)
def test_four_over_six_takes_the_better_of_both(case: str):
    weight = weights(case)
    scales = weight_scales(weight, "nvfp4", "four_over_six")
    outer = scales.weight_scale_2
    assert outer.item() == pytest.approx(weight.abs().max().item() / 6 / 256, rel=1e-4)
    to_six = weight.float().view(6, -1, BLOCK).abs().amax(-1) / (6 * outer)
    to_six = torch.where(to_six == 0, 1, to_six)
    alone = [
        LinearScales("nvfp4", (to_six * m).clamp(min=2**-9).to(torch.float8_e4m3fn), outer)
        for m in (1.0, 1.5)
    ]
    errors = np.stack([error(weight, one) for one in alone])
    assert np.array_equal(error(weight, scales), errors.min(0))
    if case == "normal":
        assert (errors[1] < errors[0]).any()
        assert (errors[0] < errors[1]).any()
        assert error(weight, scales).sum() < error(weight, weight_scales(weight, "nvfp4")).sum()


@pytest.mark.parametrize("case", CASES)
def test_the_largest_magnitude_becomes_the_largest_code(case: str):
    weight = weights(case)
    scales = weight_scales(weight, "nvfp4")
    amax = weight.abs().max().double().item()
    assert scales.weight_scale_2.item() == pytest.approx(amax / 2688, rel=1e-4)
    blocks = weight.double().view(6, -1, BLOCK).abs().amax(-1).numpy()
    exact = blocks / (6 * scales.weight_scale_2.double().item())
    nearest = E4M3[np.abs(E4M3 - exact[..., None]).argmin(-1)]
    nearest[blocks == 0] = 1
    assert np.array_equal(scales.weight_scale.double().numpy(), nearest)
    assert weight_scales(weight, "fp8").weight_scale.item() == pytest.approx(amax / 448, rel=1e-7)


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_stored_is_the_nearest_value_and_stays_it(case: str, format: str):
    weight = weights(case)
    scales = weight_scales(weight, format)
    values = round_weight(weight, scales)
    assert torch.equal(round_weight(values, scales), values)
    if format == "fp8":
        grid = np.concatenate([E4M3, -E4M3, [0]]) * scales.weight_scale.double().item()
        wanted = np.abs(weight.double().numpy()[..., None] - grid).min(-1)
        found = (values.double() - weight.double()).abs().numpy()
        # a unit in the last place of the float32 values
        assert found == pytest.approx(wanted, rel=1e-5, abs=2**-23 * values.abs().max().item())
    else:
        assert quantize_weight(weight, format, factors_of(scales)).shape == (6, 24)
        narrow = weight.double().view(6, -1, BLOCK).numpy()
        scale = (scales.weight_scale.double() * scales.weight_scale_2.double()).numpy()
        wanted = [[block_errors(narrow[r, c], scale[r, c])[0] for c in range(3)] for r in range(6)]
        assert error(weight, scales) == pytest.approx(np.array(wanted), rel=1e-5, abs=1e-18)


def test_experts_that_are_stacked_are_stored_as_each_alone():
    parts = [weights(case) for case in CASES]
    for format in ("fp8", "nvfp4"):
        own = [weight_scales(part, format) for part in parts]
        together = round_weight(torch.stack(parts), stack(own))
        assert torch.equal(
            together, torch.stack([round_weight(p, s) for p, s in zip(parts, own, strict=True)])
        )


@pytest.mark.parametrize("case", ["normal", "heavy", "row_scales"])
def test_inputs_are_rounded_as_the_golden_vectors(case: str):
    vectors = load_file(GOLDEN / "nvfp4_1x16.safetensors")
    x, amax = vectors[f"{case}.x"], vectors[f"{case}.row.amax"]
    scales = LinearScales("nvfp4", torch.ones(1), torch.ones(()), amax.squeeze() / 2688)
    found, wanted = round_input(x, scales), vectors[f"{case}.row.dequant"]
    # the fixed scale holds the largest magnitude up to one rounding, which may move what lies
    # halfway between two codes
    assert ((found - wanted).abs() > 1e-6 * wanted.abs()).double().mean() < 2e-3
    vectors = load_file(GOLDEN / "fp8_current_scaling.safetensors")
    x, inverse = vectors[f"{case}.x"], vectors[f"{case}.e4m3.scale_inv"].squeeze()
    codes = vectors[f"{case}.e4m3.codes"].view(torch.float8_e4m3fn).float()
    found = round_fp8(x, inverse)
    # dividing by the rounded inverse may move what lies halfway between two codes
    assert (found != codes * inverse).double().mean() < 1e-2


def test_a_larger_input_than_in_calibration_saturates():
    x = torch.tensor([[1.0] * 15 + [100.0]])
    for format, largest in (("fp8", 448), ("nvfp4", 2688)):
        scales = LinearScales(format, torch.ones(()), torch.ones(()), torch.tensor(8 / largest))
        assert round_input(x, scales).max().item() == pytest.approx(8)
    without = LinearScales("nvfp4", torch.ones(1), torch.ones(()), None)
    assert torch.equal(round_input(x, without), x)
