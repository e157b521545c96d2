"""Codes and scales as files hold them decode to the emulated weights of the golden vectors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemotron.precision.formats import E2M1_VALUES
from nemotron.precision.scales import LinearScales
from nemotron.precision.stored import (
    dequantize_weight,
    factors_of,
    fake_quantize_weight,
    invertible_scale,
    quantize_weight,
)

GOLDEN = Path(__file__).parent / "golden"
TABLE = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
MANY = torch.exp(torch.linspace(-30, 20, 301))


def golden_nvfp4() -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Return every case of a matrix in NVFP4 whose rows hold whole blocks."""
    found = []
    for file in sorted(GOLDEN.glob("nvfp4_*x*.safetensors")):
        tensors = load_file(file)
        for key in tensors:
            case, _, name = key.rpartition(".")
            if name != "scales" or f"{case}.dequant" not in tensors:
                continue
            own = {n: tensors[f"{case}.{n}"] for n in ("codes", "scales", "amax", "dequant")}
            own["x"] = tensors[case.split(".")[0] + ".x"]
            rows, blocks = own["scales"].shape
            if own["codes"].shape == (rows, blocks * 8):
                found.append((f"{file.stem}: {case}", own))
    return found


@pytest.mark.parametrize(("case", "golden"), golden_nvfp4(), ids=lambda v: v if v is str else "")
def test_packed_nvfp4_decodes_to_code_times_scale_times_scale(case: str, golden: dict):
    scales = golden["scales"].view(torch.float8_e4m3fn)
    outer = (golden["amax"] / 2688).reshape(())
    factors = factors_of(LinearScales("nvfp4", scales, outer))
    found = dequantize_weight(golden["codes"], "nvfp4", factors)
    # the definition by a table: low nibble first
    nibbles = torch.stack([golden["codes"] & 15, golden["codes"] >> 4], -1).flatten(1)
    wide = (scales.float() * outer).repeat_interleave(16, 1)
    assert torch.equal(found, TABLE[nibbles.long()] * wide), case
    # Transformer Engine multiplies in another order: two roundings apart; subnormals absolutely
    torch.testing.assert_close(found, golden["dequant"], rtol=2.5e-7, atol=1e-44, msg=case)


def test_there_are_golden_cases():
    assert len(golden_nvfp4()) >= 20


@pytest.mark.parametrize("kind", ["", ".pow2"])
def test_golden_fp8_decodes_to_the_bit_and_is_what_the_weight_becomes(kind: str):
    tensors = load_file(GOLDEN / "fp8_current_scaling.safetensors")
    cases = [key.removesuffix(".x") for key in tensors if key.endswith(".x")]
    assert len(cases) >= 5
    for case in cases:
        start = f"{case}.e4m3{kind}"
        scale = tensors[f"{start}.scale_inv"].reshape(())
        codes = tensors[f"{start}.codes"].view(torch.float8_e4m3fn)
        if not bool(scale.isfinite()) or not bool(scale > 0):
            continue
        found = dequantize_weight(codes, "fp8", factors_of(LinearScales("fp8", scale)))
        assert torch.equal(found, codes.float() * scale), case
        if kind == ".pow2":  # dividing by a power of two is multiplying by its inverse
            weight = tensors[f"{case}.x"].float()
            assert torch.equal(
                quantize_weight(weight, "fp8", scale).view(torch.uint8),
                tensors[f"{start}.codes"],
            ), case


def test_a_decoded_weight_becomes_the_same_codes_again():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 48, generator=generator)
    blocks = (weight.view(7, 3, 16).abs().amax(-1) * 448 / weight.abs().amax()).clamp(min=2**-9)
    blocks[2, 1] = 0
    scales = LinearScales("nvfp4", blocks.to(torch.float8_e4m3fn), weight.abs().amax() / 2688)
    once = fake_quantize_weight(weight, scales)
    assert torch.equal(fake_quantize_weight(once, scales), once)
    assert not once[2, 16:32].any()
    weight[2, 16:32] = 0
    assert 0.05 < (once - weight).norm() / weight.norm() < 0.2


def test_an_invertible_scale_gives_the_same_values_whichever_way_it_is_stored():
    values = torch.arange(1.0, 449.0).to(torch.float8_e4m3fn).float().unique()
    changed = 0
    for scale in MANY:
        found = invertible_scale(scale)
        inverse = found.reciprocal()
        assert inverse.reciprocal() == found
        assert torch.equal(values / inverse, values * found)
        assert scale <= found <= scale * (1 + 1e-3)
        changed += bool(found != scale)
    assert changed > len(MANY) / 2
