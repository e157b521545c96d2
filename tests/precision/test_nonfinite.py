"""Matrices with infinities and NaN, up to whole ones: none is lost in silence, none spreads."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron.precision import fp8, mxfp8, nvfp4
from nemotron.precision.formats import E4M3, to_fp8
from nemotron.precision.linear import quantized_linear
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import SCHEMES

QUANTIZERS = {
    "nvfp4": (lambda x: nvfp4.quantize(x), 1, 16),
    "nvfp4 squares": (lambda x: nvfp4.quantize(x, height=16), 16, 16),
    "mxfp8": (lambda x: mxfp8.quantize(x), 1, 32),
    "mxfp8 squares": (lambda x: mxfp8.quantize(x, height=32), 32, 32),
    "fp8 current": (lambda x: fp8.quantize_current(x), 1 << 20, 1 << 20),
    "fp8 blocks": (lambda x: fp8.quantize_blocks(x), 1, 128),
    "fp8 squares": (lambda x: fp8.quantize_blocks(x, height=128), 128, 128),
}
"""What quantizes, and rows and columns that share a scale (NVFP4's share one more)."""
EXTREME = st.sampled_from(["inf", "nan", "both"])
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**31))
SHARES = st.sampled_from([0.0, 0.002, 0.3, 1.0])


def draw(shape: tuple[int, int, int], share: float, kind: str) -> torch.Tensor:
    """Numbers over many powers of two; a share of them, and at least one, is not finite."""
    rows, columns, seed = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.exp(
        8 * torch.randn(rows, columns, generator=g)
    )
    chosen = torch.rand(rows, columns, generator=g) < share
    chosen.view(-1)[seed % chosen.numel()] = True
    infinite = torch.where(torch.rand(rows, columns, generator=g) < 0.5, math.inf, -math.inf)
    values = {"inf": infinite, "nan": torch.full_like(x, math.nan)}
    is_nan = torch.rand(rows, columns, generator=g) < 0.5
    values["both"] = torch.where(is_nan, values["nan"], values["inf"])
    return torch.where(chosen, values[kind], x)


def touched(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Elements that share a block with one that is not finite."""
    found = torch.zeros_like(x, dtype=torch.bool)
    for row in range(0, x.shape[0], height):
        for column in range(0, x.shape[1], width):
            block = (slice(row, row + height), slice(column, column + width))
            found[block] = not x[block].isfinite().all()
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) and torch.equal(
        a.isnan(), b.isnan()
    )


@pytest.mark.parametrize("name", QUANTIZERS)
@given(SHAPES, SHARES, EXTREME)
def test_a_nan_never_becomes_a_number(name: str, shape, share: float, kind: str):
    x = draw(shape, share, kind)
    found = QUANTIZERS[name][0](x).dequantize()
    assert found.shape == x.shape
    assert found[x.isnan()].isnan().all()


@pytest.mark.parametrize("name", QUANTIZERS)
@given(SHAPES, SHARES)
def test_negating_infinities_negates_what_they_become(name: str, shape, share: float):
    x = draw(shape, share, "inf")
    assert same(QUANTIZERS[name][0](-x).dequantize(), -QUANTIZERS[name][0](x).dequantize())


@pytest.mark.parametrize("name", [n for n in QUANTIZERS if not n.startswith("nvfp4")])
@given(SHAPES, SHARES, EXTREME)
def test_a_block_of_finite_numbers_does_not_notice_others(name: str, shape, share, kind: str):
    quantize, height, width = QUANTIZERS[name]
    x = draw(shape, share, kind)
    apart = ~touched(x, height, width)
    alone = quantize(torch.where(apart, x, 0.0)).dequantize()
    assert torch.equal(quantize(x).dequantize()[apart], alone[apart])


@pytest.mark.parametrize("name", ["fp8 current", "fp8 blocks", "fp8 squares"])
@given(SHAPES, SHARES, EXTREME)
def test_fp8_does_not_scale_beside_an_infinity_which_saturates(name, shape, share, kind: str):
    quantize, height, width = QUANTIZERS[name]
    x = draw(shape, share, kind)
    beside = touched(x, height, width)
    found = quantize(x)
    assert same(found.dequantize()[beside], to_fp8(x, E4M3).float()[beside])
    infinite = x.isinf() & beside
    assert torch.equal(found.dequantize()[infinite], x[infinite].sign() * 448)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp8 squares"])
@given(SHAPES, SHARES, EXTREME)
def test_mxfp8_keeps_infinities_and_a_nan_takes_its_block(name: str, shape, share, kind: str):
    quantize, height, width = QUANTIZERS[name]
    x = draw(shape, share, kind)
    found = quantize(x).dequantize()
    with_nan = touched(torch.where(x.isnan(), math.nan, 0.0), height, width)
    assert torch.equal(found.isnan(), with_nan)
    infinite = x.isinf() & ~with_nan
    assert torch.equal(found[infinite], x[infinite])
    # beside an infinity the scale is 2^127: only numbers near the end of float32 remain
    finite = touched(x, height, width) & x.isfinite() & ~with_nan
    expected = to_fp8(x.double().div(2.0**127).float(), E4M3).double() * 2.0**127
    assert torch.equal(found[finite].double(), expected[finite].float().double())


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4 squares"])
@given(SHAPES, SHARES, EXTREME)
def test_nvfp4_has_no_finite_number_where_the_global_scale_is_none(name, shape, share, kind: str):
    x = draw(shape, share, kind)
    found = QUANTIZERS[name][0](x)
    assert not found.dequantize().isfinite().any()
    packed = found.pack()
    assert packed.packed.shape == (x.shape[0], -(-x.shape[1] // 2))
    assert not packed.unpack().dequantize().isfinite().any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("operand", ["x", "w", "dy"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_whole_operand_that_is_not_finite_shows_in_what_depends_on_it(name, operand, value):
    operands = {"x": torch.randn(20, 48), "w": torch.randn(40, 48), "dy": torch.randn(20, 40)}
    operands[operand] = torch.full_like(operands[operand], value)
    x, w = (operands[n].clone().requires_grad_() for n in ("x", "w"))
    y = quantized_linear(x, w, SCHEMES[name], Draw(12))
    y.backward(operands["dy"])
    found = {"y": y.detach(), "dx": x.grad, "dw": w.grad}
    dependent = {"x": ("y", "dw"), "w": ("y", "dx"), "dy": ("dx", "dw")}[operand]
    for result, tensor in found.items():
        assert tensor is not None
        if result not in dependent:
            assert tensor.isfinite().all()
        elif name.startswith("fp8") and math.isinf(value):
            # FP8 saturates: an infinity counts as the largest number, as on the hardware
            assert tensor.isfinite().all()
        else:
            assert not tensor.isfinite().any()
