"""What torch's scaled product is handed on a GPU: legal by its own check, and the right numbers.

No GPU is needed: a stand-in gives the arguments to torch's shape check for CUDA, then reads them as
cuBLAS documents their layout and multiplies.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType

from nemotron.precision import scaled_mm
from nemotron.precision.formats import decode_e2m1, decode_e8m0, unpack_e2m1
from nemotron.precision.linear import quantized_grouped_linear, quantized_linear
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import SCHEMES, NVFP4Scheme, multiply

REAL = F.scaled_mm
BLOCKS = {
    ScalingType.BlockWise1x16: 16,
    ScalingType.BlockWise1x32: 32,
    ScalingType.BlockWise1x128: 128,
}


def check_as_cuda(a, b, sa, ka, sb, kb, **options):
    """Let torch judge shapes, strides and dtypes as on a GPU."""
    with FakeTensorMode():

        def like(t: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

        found = REAL(like(a), like(b), list(map(like, sa)), ka, list(map(like, sb)), kb, **options)
    assert found.shape == (a.shape[0], b.shape[1])


def plain_scales(stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Read tiles of 128 by 4: the scale of row r, column c is at 16 (r % 32) + 4 (r // 32) + c."""
    flat, wide = stored.flatten(), -(-columns // 4)
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None]
    tile = (r // 128) * wide + c // 4
    return flat[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4]


def decoded(elements: torch.Tensor, scales, kinds) -> torch.Tensor:
    """Return one side's numbers in float64."""
    kind, rows = kinds[0], elements.shape[0]
    if elements.dtype == torch.float4_e2m1fn_x2:
        values = decode_e2m1(unpack_e2m1(elements.view(torch.uint8))).double()
    else:
        values = elements.double()
    columns = values.shape[1]
    if kind == ScalingType.TensorWise:
        return values * scales[0].double()
    if kind == ScalingType.BlockWise128x128:
        factors = scales[0].T[:, : columns // 128].double()
        return values * factors.repeat_interleave(128, 0).repeat_interleave(128, 1)
    block = BLOCKS[kind]
    if kind == ScalingType.BlockWise1x128:
        factors = scales[0].double()
    else:
        stored = scales[0].view(torch.uint8)
        plain = plain_scales(stored, rows, columns // block)
        is_mx = kind == ScalingType.BlockWise1x32
        factors = (
            decode_e8m0(plain) if is_mx else plain.view(torch.float8_e4m3fn).float()
        ).double()
    values = values * factors.repeat_interleave(block, 1)
    return values * scales[1].double() if len(scales) > 1 else values


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    made = []

    def stand_in(a, b, sa, ka, sb, kb, *, output_dtype, **options):
        check_as_cuda(a, b, sa, ka, sb, kb, output_dtype=output_dtype, **options)
        made.append(f"{ka[0].name} x {kb[0].name}")
        return (decoded(a, sa, ka) @ decoded(b.T, sb, kb).T).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", stand_in)
    return made


KINDS = {
    "fp8_current": ["TensorWise x TensorWise"] * 3,
    "fp8_block": ["BlockWise1x128 x BlockWise128x128"] * 2 + ["BlockWise1x128 x BlockWise1x128"],
    "mxfp8": ["BlockWise1x32 x BlockWise1x32"] * 3,
    "nvfp4": ["BlockWise1x16 x BlockWise1x16"] * 3,
}


@pytest.mark.parametrize("shape", [(35, 80, 112), (160, 288, 640), (256, 640, 144), (1, 16, 16)])
@pytest.mark.parametrize("name", [*SCHEMES, "nvfp4 rows"])
def test_gpus_are_handed_legal_layouts_of_the_right_numbers(calls, name: str, shape):
    tokens, width, out = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=g)
    weight = torch.randn(out, width, generator=g) / 8
    dy = torch.randn(tokens, out, generator=g) * 1e-3
    scheme = NVFP4Scheme(square_weights=False) if name == "nvfp4 rows" else SCHEMES[name]
    results = []
    for product in (multiply, scaled_mm.multiply):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = quantized_linear(*leaves, scheme, Draw(12), product)
        y.backward(dy)
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        # the same operands; float32 sums of at most 640 terms against float64
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()
    if tokens > 128:
        assert calls == KINDS[name.split()[0]]


@pytest.mark.parametrize("name", [*SCHEMES, "nvfp4 rows"])
def test_each_experts_part_of_a_matrix_is_handed_over(calls, name: str):
    counts = torch.tensor([20, 0, 131, 16])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(167, 144, generator=g)
    weight = torch.randn(4, 200, 144, generator=g) / torch.tensor([1.0, 2, 3, 40]).view(4, 1, 1)
    dy = torch.randn(167, 200, generator=g) * 1e-3
    scheme = NVFP4Scheme(square_weights=False) if name == "nvfp4 rows" else SCHEMES[name]
    results = []
    for product in (multiply, scaled_mm.multiply):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = quantized_grouped_linear(*leaves, counts, scheme, Draw(12), product)
        y.backward(dy)
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        # the same operands; float32 sums of at most 200 terms against float64
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()
    assert len(calls) == 9, "three experts with rows, three products each"
