"""FP8 by kernels: the emulation's codes and scales to the bit, and the products of what they are.

Without a GPU the kernels run in Triton's interpreter, and a stand-in reads what cuBLAS is handed.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from test_scaled_mm import check_as_cuda, decoded

from nemotron.ops.grouped_linear import tiles
from nemotron.precision import fp8, fp8_layer
from nemotron.precision.config import DelayedConfig
from nemotron.precision.delayed import DelayedFP8Scheme, Histories
from nemotron.precision.formats import E4M3, E5M2
from nemotron.precision.groups import Groups
from nemotron.precision.kernels import quantize_fp8 as kernels
from nemotron.precision.linear import quantized_grouped_linear, quantized_linear
from nemotron.precision.schemes import SCHEMES, Scheme
from tests.support.cases import further

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
HOPPER = not HAS_CUDA or torch.cuda.get_device_capability()[0] == 9
FORMATS = ["fp8_current", "fp8_delayed", "fp8_block"]
COUNTS = [20, 0, 130]
TENSORS = torch.bfloat16 if HAS_CUDA else torch.float32
"""What has kernels with one scale a tensor: on a GPU not float32 (`kernels.has_kernels`)."""


@pytest.fixture(autouse=True)
def cublas(monkeypatch) -> None:
    """Without a GPU, let torch judge the layouts that cuBLAS gets, and multiply what they mean."""
    if HAS_CUDA:
        return

    def stand_in(a, b, sa, ka, sb, kb, *, output_dtype, **options):
        check_as_cuda(a, b, sa, ka, sb, kb, output_dtype=output_dtype, **options)
        return (decoded(a, sa, ka) @ decoded(b.T, sb, kb).T).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", stand_in)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Draw numbers of every exponent, with zeros of both signs and infinities among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * 2.0 ** torch.randint(-30, 30, shape, generator=g)
    flat = x.view(-1)
    flat[:: flat.numel() // 7 + 1] = 0.0
    flat[3 :: flat.numel() // 5 + 1] = -0.0
    return x


def bytes_of(codes: kernels.Codes) -> Tensor:
    return codes.elements.view(torch.uint8).cpu()


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda format: format.name)
def test_rounding_is_the_emulations_for_any_number(format):
    # every float32 whose last 15 bits are 0, and its neighbors: all ties of both formats
    bits = torch.arange(-(2**16), 2**16, dtype=torch.int32) << 15
    bits = torch.cat([bits, bits + 1, bits - 1]).view(-1, 1024)
    x = bits.view(torch.float32).nan_to_num(nan=3.0, posinf=torch.inf, neginf=-torch.inf)
    x = x.to(TENSORS)
    one = torch.ones(1)
    expected = fp8.quantize_scaled(x, format, one, Groups((x.shape[0],))).codes
    found = kernels.quantize(
        x.to(DEVICE), format, kernels.BY_SCALE, given=one.to(DEVICE), row=True, columnwise=True
    )
    assert torch.equal(bytes_of(found.row), expected)
    assert torch.equal(bytes_of(found.columnwise), expected.T)


def test_a_nan_stays_one():
    x = torch.full((16, 16), torch.nan, device=DEVICE, dtype=TENSORS)
    for format in (E4M3, E5M2):
        found = kernels.quantize(x, format, kernels.BY_AMAX, given=kernels.largest(x), multiple=16)
        assert found.row.elements.float().isnan().all()
        assert found.row.scale_inv.item() == 1


@pytest.mark.parametrize("dtype", sorted({TENSORS, torch.bfloat16}, key=str))
@pytest.mark.parametrize("shape", [(1, 16), (7, 129), (130, 200)])
def test_tensors_have_the_emulations_codes_along_both_directions(shape, dtype):
    x = numbers(*shape).to(dtype)
    for tensor in (
        x,
        torch.zeros_like(x),
        x * 1e-38,
        x.index_fill(0, torch.tensor([0]), torch.inf),
    ):
        given = kernels.largest(tensor.to(DEVICE))
        expected = fp8.quantize_current(tensor, E5M2)
        found = kernels.quantize(tensor.to(DEVICE), E5M2, kernels.BY_AMAX, given=given, multiple=16)
        for side, codes in ((found.row, expected.codes), (found.columnwise, expected.codes.T)):
            whole = bytes_of(side)
            assert torch.equal(whole[: codes.shape[0], : codes.shape[1]], codes)
            assert whole.shape == tuple(-(-size // 16) * 16 for size in codes.shape)
            # its padding is zero
            assert whole.count_nonzero() == codes.count_nonzero()
            assert torch.equal(side.scale_inv.cpu(), expected.scale_inv.flatten())


@pytest.mark.parametrize("shape", [(1, 16), (130, 200)])
def test_blocks_have_the_emulations_codes_and_scales(shape):
    x = numbers(*shape).bfloat16()
    rows, columns = shape
    found = kernels.quantize(x.to(DEVICE), E4M3, kernels.BY_ROWS)
    row, columnwise = fp8.quantize_blocks(x), fp8.quantize_blocks(x, height=128, width=1)
    assert torch.equal(bytes_of(found.row)[:rows, :columns], row.codes)
    assert torch.equal(bytes_of(found.columnwise)[:columns, :rows], columnwise.codes.T)
    assert torch.equal(found.row.scale_inv.cpu()[:, :rows], row.scale_inv.T)
    assert torch.equal(found.columnwise.scale_inv.cpu()[:, :columns], columnwise.scale_inv)


def test_squares_of_weights_have_the_emulations_codes_and_scales():
    weight = numbers(2, 130, 200, seed=1)
    found = kernels.quantize(weight.to(DEVICE), E4M3, kernels.BY_SQUARES, narrow=True)
    for expert in range(2):
        expected = fp8.quantize_blocks(weight[expert].bfloat16(), height=128)
        for side, codes, scales in (
            (found.row, expected.codes, expected.scale_inv),
            (found.columnwise, expected.codes.T, expected.scale_inv.T),
        ):
            own = bytes_of(side)[expert]
            assert torch.equal(own[: codes.shape[0], : codes.shape[1]], codes)
            wide = side.scale_inv[expert].cpu()[: scales.shape[0], : scales.shape[1]]
            assert torch.equal(wide, scales)
            # their padding is zero
            assert side.scale_inv[expert].count_nonzero() == scales.numel()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [further(1), 4, further(2048)])
def test_magnitudes_of_tiles_give_the_scale_of_the_largest(parts: int, monkeypatch):
    monkeypatch.setattr(kernels, "PARTS", parts)
    x = numbers(sum(COUNTS), 300, seed=3).clamp(-1e30, 1e30).bfloat16().to(DEVICE)
    plan = tiles.plan(torch.tensor(COUNTS, device=DEVICE), len(x))
    for tensor, where in ((x, plan), (x, None), (x.view(2, -1, 300), None)):
        by_amax, by_parts = (
            kernels.quantize(tensor, E5M2, scaling, given=find(tensor, where), plan=where)
            for scaling, find in (
                (kernels.BY_AMAX, kernels.largest),
                (kernels.BY_PARTS, kernels.measure),
            )
        )
        assert torch.equal(bytes_of(by_parts.row), bytes_of(by_amax.row))
        held = by_amax.row.scale_inv.isfinite()  # an expert without rows has no scale
        assert torch.equal(by_parts.row.scale_inv[held], by_amax.row.scale_inv[held])


def test_rows_of_experts_begin_at_tiles_once_they_are_transposed():
    x = numbers(sum(COUNTS) + 9, 140, seed=2).bfloat16()
    plan = tiles.plan(torch.tensor(COUNTS, device=DEVICE), len(x))
    given = kernels.largest(x.to(DEVICE), plan)
    found = kernels.quantize(x.to(DEVICE), E4M3, kernels.BY_AMAX, given=given, plan=plan)
    # nobody has the last 9 rows
    expected = fp8.quantize_current(x[: sum(COUNTS)], groups=Groups(tuple(COUNTS)))
    assert torch.equal(bytes_of(found.row)[: sum(COUNTS), :140], expected.codes)
    assert given[1] == 0
    tile, start = 0, 0
    for count in COUNTS:
        own = bytes_of(found.columnwise)[:140, tile * 128 :][:, : -(-count // 128) * 128]
        assert torch.equal(own[:, :count], expected.codes[start : start + count].T)
        assert not own[:, count:].any()
        tile, start = tile - (-count // 128), start + count


def scheme_of(format: str, tensors: int = 1) -> Scheme:
    """A scheme; the delayed one has scales from a step that had seen other magnitudes."""
    if format != "fp8_delayed":
        return SCHEMES[format]
    histories = Histories({"layer": tensors}, DelayedConfig(), torch.device(DEVICE))
    scheme = DelayedFP8Scheme(histories.slots("layer", count=tensors))
    for operand, amax in (("x", 3.0), ("w", 0.5), ("dy", 2e-3)):
        scheme.slots[operand].newest.fill_(amax)
    histories.roll(lambda amaxes: amaxes)
    return scheme


def trained(layer, scheme: Scheme, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """Return output, gradients, and what delayed scaling remembers."""
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = layer(*leaves)
    y.backward(dy)
    found = [y.detach(), leaves[0].grad, leaves[1].grad]
    if isinstance(scheme, DelayedFP8Scheme):
        found += [slot.newest for slot in scheme.slots.values()]
    return found


def compare(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype
        assert own.shape == other.shape
        # the same operands: float32 sums of at most 200 terms, or one rounding to bfloat16; the
        # tensor cores of Hopper keep 14 bits of sums
        limit = 2**-7 if DEVICE == "cuda" or dtype == torch.bfloat16 else 2e-6
        assert (own.float() - other.float()).norm() <= limit * other.float().norm()


@pytest.mark.skipif(not HOPPER, reason="the kernels' products are for Hopper")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(35, 80, 112), (130, 144, 256)])
@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_is_the_emulations(format: str, shape, dtype):
    tokens, width, out = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=g).to(dtype).to(DEVICE)
    weight = (torch.randn(out, width, generator=g) / 8).to(DEVICE)
    dy = (torch.randn(tokens, out, generator=g) * 1e-3).to(dtype).to(DEVICE)
    ours, theirs = scheme_of(format), scheme_of(format)
    layer = fp8_layer.FP8Layer({"weight": ours})
    compare(
        trained(lambda x, w: layer.linear(x, w, None), ours, x, weight, dy),
        trained(lambda x, w: quantized_linear(x, w, theirs), theirs, x, weight, dy),
        dtype,
    )


@pytest.mark.slow
@pytest.mark.skipif(not HOPPER, reason="the kernels' products are for Hopper")
@pytest.mark.parametrize("dtype", [further(torch.float32), torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_experts_are_the_emulations(format: str, dtype):
    rows = sum(COUNTS)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 144, generator=g).to(dtype).to(DEVICE)
    weight = torch.randn(3, 200, 144, generator=g) / torch.tensor([1.0, 2, 40]).view(3, 1, 1)
    dy = (torch.randn(rows, 200, generator=g) * 1e-3).to(dtype).to(DEVICE)
    counts, weight = torch.tensor(COUNTS, device=DEVICE), weight.to(DEVICE)
    ours, theirs = scheme_of(format, 3), scheme_of(format, 3)
    layer = fp8_layer.FP8Layer({"up": ours})
    compare(
        trained(lambda x, w: layer.grouped(x, w, counts, "up", None), ours, x, weight, dy),
        trained(lambda x, w: quantized_grouped_linear(x, w, counts, theirs), theirs, x, weight, dy),
        dtype,
    )


@pytest.mark.skipif(not HOPPER, reason="the kernels' products are for Hopper")
@pytest.mark.parametrize("emulated", [False, True])
def test_rows_that_no_expert_has_become_zero(emulated: bool, monkeypatch):
    x = torch.randn(20, 16, device=DEVICE, dtype=TENSORS, requires_grad=True)
    weight = torch.randn(2, 16, 16, device=DEVICE)
    layer = fp8_layer.FP8Layer({"up": SCHEMES["fp8_current"]})
    counts = torch.tensor([5, 9], device=DEVICE)
    if emulated:
        monkeypatch.setattr(kernels, "has_kernels", lambda dtype, *, in_blocks: False)
    y = layer.grouped(x, weight, counts, "up", None)
    y.sum().backward()
    for rows in (y, x.grad):
        assert rows[:14].abs().amax(1).gt(0).all()
        assert not rows[14:].any()


@pytest.mark.parametrize("format", ["fp8_current", "fp8_delayed"])
def test_a_layer_without_kernels_is_emulated(format: str, monkeypatch):
    monkeypatch.setattr(kernels, "has_kernels", lambda dtype, *, in_blocks: False)
    x, weight = torch.randn(20, 16, device=DEVICE), torch.randn(32, 16, device=DEVICE)
    dy, ours, theirs = torch.randn(20, 32, device=DEVICE), scheme_of(format), scheme_of(format)
    layer = fp8_layer.FP8Layer({"weight": ours})
    found = trained(lambda x, w: layer.linear(x, w, None), ours, x, weight, dy)
    expected = trained(lambda x, w: quantized_linear(x, w, theirs), theirs, x, weight, dy)
    assert all(map(torch.equal, found, expected))


def test_a_layer_without_rows_has_no_gradient():
    x = torch.randn(0, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(2, 16, 16, device=DEVICE, requires_grad=True)
    layer = fp8_layer.FP8Layer({"up": SCHEMES["fp8_block"]})
    y = layer.grouped(x, weight, torch.zeros(2, dtype=torch.int64, device=DEVICE), "up", None)
    y.sum().backward()
    assert y.shape == (0, 16)
    assert x.grad.shape == (0, 16)
    assert not weight.grad.any()


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="the kernels' products are for Hopper")
@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_of_experts_waits_for_no_device(format: str, no_waits):
    counts = torch.tensor([300, 0, 412, 312], device=DEVICE)
    x = torch.randn(1024, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 384, 256, device=DEVICE, requires_grad=True)
    layer = fp8_layer.FP8Layer({"up": scheme_of(format, 4)})
    with no_waits():
        layer.grouped(x, weight, counts, "up", None).sum().backward()
    assert weight.grad.isfinite().all()
