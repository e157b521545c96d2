"""Formats against their definitions, and properties that hold for any input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron.precision import fp8, mxfp8, nvfp4
from nemotron.precision.formats import (
    E2M1_VALUES,
    E4M3,
    E5M2,
    ceil_to_e8m0,
    decode_e2m1,
    decode_e8m0,
    encode_e2m1,
    pack_e2m1,
    round_e2m1,
    round_e2m1_stochastically,
    to_fp8,
    unpack_e2m1,
)

FINITE = st.floats(-1e4, 1e4, width=32)
MATRICES = st.tuples(st.integers(1, 20), st.integers(1, 50), st.integers(0, 2**31))


def draw(shape: tuple[int, int, int], spread: float = 3.0) -> torch.Tensor:
    """Numbers over many powers of two, with zeros and a row of nothing else."""
    rows, columns, seed = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.exp(
        spread * torch.randn(rows, columns, generator=g)
    )
    x[torch.rand(rows, columns, generator=g) < 0.1] = 0
    if rows > 2:
        x[1] = 0
    return x


def nearest(value: float) -> float:
    """The E2M1 value next to a number; of two as near, the one with the even code."""
    order = sorted(range(8), key=lambda code: (abs(abs(value) - E2M1_VALUES[code]), code % 2))
    return math.copysign(E2M1_VALUES[order[0]], value)


@given(st.one_of(FINITE, st.sampled_from([x / 8 for x in range(-60, 61)])))
def test_e2m1_takes_the_nearest_value_and_ties_go_to_the_even_code(value: float):
    assert round_e2m1(torch.tensor([value])).item() == nearest(value)


def test_e2m1_saturates_and_keeps_the_sign_of_nothing():
    found = round_e2m1(torch.tensor([math.inf, -math.inf, math.nan, 1e-45, -1e-45, -0.0]))
    assert found.tolist() == [6, -6, 6, 0, 0, 0]
    assert found.signbit().tolist() == [False, True, False, False, True, True]


def test_every_e2m1_code_comes_back():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(encode_e2m1(decode_e2m1(codes)), codes)
    assert decode_e2m1(codes).tolist() == [*E2M1_VALUES, *(-v for v in E2M1_VALUES)]
    assert torch.equal(unpack_e2m1(pack_e2m1(codes.view(2, 8))), codes.view(2, 8))
    assert pack_e2m1(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_fp8_saturates_instead_of_overflowing(format):
    values = torch.tensor([1e9, -1e9, math.inf, format.max * 1.01, math.nan])
    found = to_fp8(values, format).float()
    assert found[:4].tolist() == [format.max, -format.max, format.max, format.max]
    assert found[4].isnan()


@given(st.floats(0, 2.0**127, width=32))
def test_e8m0_is_the_smallest_power_of_two_that_is_not_below(value: float):
    byte = ceil_to_e8m0(torch.tensor([value]))
    power = decode_e8m0(byte).double().item()
    assert power >= value or byte.item() == 254
    assert byte.item() == 0 or power / 2 < value


def test_e8m0_at_its_edges():
    values = torch.tensor([0.0, 2.0**-149, 2.0**-127, 1.5 * 2.0**-127, 1.0, math.inf, math.nan])
    assert ceil_to_e8m0(values).tolist() == [0, 0, 0, 1, 127, 254, 255]
    assert decode_e8m0(torch.tensor([255], dtype=torch.uint8)).isnan().all()


QUANTIZERS = {
    "nvfp4": lambda x: nvfp4.quantize(x),
    "nvfp4 squares": lambda x: nvfp4.quantize(x, height=16),
    "mxfp8": lambda x: mxfp8.quantize(x),
    "mxfp8 squares": lambda x: mxfp8.quantize(x, height=32),
    "fp8 current": lambda x: fp8.quantize_current(x, power_of_two=True),
    "fp8 blocks": lambda x: fp8.quantize_blocks(x),
    "fp8 squares": lambda x: fp8.quantize_blocks(x, height=128),
}
WORST = {"nvfp4": 1 / 4 + 1 / 16, "mxfp8": 1 / 16, "fp8": 1 / 16}
"""Largest error of a value relative to the largest of its block: half a step of the elements, and
what the rounding of NVFP4's scale adds."""


@pytest.mark.parametrize("name", QUANTIZERS)
@given(MATRICES)
def test_negating_the_input_negates_the_values(name: str, shape):
    x = draw(shape)
    assert torch.equal(QUANTIZERS[name](-x).dequantize(), -QUANTIZERS[name](x).dequantize())


@pytest.mark.parametrize("name", QUANTIZERS)
@given(MATRICES)
def test_zeros_stay_zeros_and_errors_stay_within_half_a_step_of_the_largest(name: str, shape):
    x = draw(shape)
    found = QUANTIZERS[name](x).dequantize()
    assert found.shape == x.shape
    assert not found[x == 0].any()
    assert (found - x).abs().max() <= WORST[name.split()[0]] * x.abs().max()


@pytest.mark.parametrize("name", [n for n in QUANTIZERS if not n.startswith("nvfp4")])
@given(MATRICES)
def test_quantizing_what_was_quantized_changes_nothing(name: str, shape):
    # power-of-two scales; with NVFP4's the scale of the scales may move by a rounding
    once = QUANTIZERS[name](draw(shape, spread=1.0)).dequantize()
    assert torch.equal(QUANTIZERS[name](once).dequantize(), once)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_power_of_two_scales_through(name: str):
    x = draw((33, 150, 5), spread=1.0)
    once, doubled = QUANTIZERS[name](x), QUANTIZERS[name](x * 8)
    assert torch.equal(once.codes, doubled.codes)
    assert torch.equal(once.dequantize() * 8, doubled.dequantize())


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=2, max_size=2).map(sorted))
def test_a_larger_block_never_has_a_smaller_scale(pair: list[float]):
    small, large = (torch.full((1, 64), value) for value in pair)
    assert mxfp8.quantize(small).scales[0, 0] <= mxfp8.quantize(large).scales[0, 0]
    amax = torch.tensor([2.0**100])
    scales = [nvfp4.quantize(x, amax=amax).scales.bytes[0, 0] for x in (small, large)]
    assert scales[0] <= scales[1]


def test_squares_are_the_same_values_in_both_directions():
    x = draw((64, 96, 3))
    assert torch.equal(
        nvfp4.quantize(x, height=16).dequantize(),
        nvfp4.quantize(x.T.contiguous(), height=16).dequantize().T,
    )
    assert torch.equal(
        mxfp8.quantize(x, height=32).dequantize(),
        mxfp8.quantize(x.T.contiguous(), height=32).dequantize().T,
    )


def test_stored_nvfp4_is_what_was_quantized_at_four_and_a_half_bits():
    x = draw((32, 64, 9))
    found = nvfp4.quantize(x)
    packed = found.pack()
    assert torch.equal(packed.unpack().dequantize(), found.dequantize())
    bits = 8 * (packed.packed.numel() + packed.scales.bytes.numel())
    assert bits == 4.5 * x.numel()
    odd = nvfp4.quantize(draw((5, 33, 2)))
    assert torch.equal(odd.pack().unpack().dequantize(), odd.dequantize())


def test_stochastic_rounding_follows_the_rule_for_every_bit_pattern():
    bits = torch.arange(256)
    grid = torch.tensor([*E2M1_VALUES])
    for value in [0.0, 0.01, 0.3, 0.5, 0.77, 1.3, 1.99, 2.2, 3.0, 3.99, 4.01, 5.9, 6.0, 9.0]:
        found = round_e2m1_stochastically(torch.full((256,), value), bits)
        lower = grid[grid <= value].max()
        upper = grid[grid >= value].min() if value <= 6 else lower
        assert set(found.tolist()) <= {lower.item(), upper.item()}
        if upper > lower:
            # the probability is the distance from below in steps, rounded down to 1/256
            share = (torch.tensor(value) - lower) / (upper - lower)
            assert (found == upper).sum().item() == math.floor(256 * share.item())
        negative = round_e2m1_stochastically(torch.full((256,), -value), bits)
        assert torch.equal(negative, -found)
