"""MXFP8 and NVFP4 by kernels: every bit is the emulation's. Without a GPU, in the interpreter."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemotron.precision.kernels import available
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import SCHEMES, MXFP8Scheme, NVFP4Scheme, Quantized, Scheme
from tests.support.cases import further

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def with_kernels(monkeypatch):
    """Return what quantizes by kernels wherever the tensor is."""

    def quantize(scheme: Scheme, operand: str, x: Tensor, *arguments, **options):
        module = import_module("nemotron.precision.kernels.quantize_blocks")
        with monkeypatch.context() as patched:
            patched.setattr(available, "of_blocks", lambda x: module)
            return scheme.quantize(operand, x.to(DEVICE), *arguments, **options)

    return quantize


def parts(side: Quantized | None) -> list[Tensor]:
    """Return all that a side of products is made of."""
    if side is None:
        return []
    matrix = side.matrix
    if hasattr(matrix, "elements") and matrix.elements.dtype != torch.float32:
        return [matrix.codes.cpu(), matrix.scales.cpu()]
    return [matrix.codes.cpu(), matrix.scales.bytes.cpu(), matrix.scales.amax.cpu()]


def same(ours: tuple, theirs: tuple) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert (own is None) == (other is None)
        for a, b in zip(parts(own), parts(other), strict=True):
            assert torch.equal(a, b)


SCHEMES_HERE = {
    "mxfp8": SCHEMES["mxfp8"],
    "nvfp4": SCHEMES["nvfp4"],
    "nvfp4 rows": NVFP4Scheme(square_weights=False),
    "nvfp4 plain": NVFP4Scheme(hadamard=False, stochastic=False),
}


@pytest.mark.parametrize("dtype", [further(torch.float32), torch.bfloat16])
@pytest.mark.parametrize("operand", ["x", "w", "dy"])
@pytest.mark.parametrize("name", SCHEMES_HERE)
def test_operands_are_the_emulations(with_kernels, name: str, operand: str, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(69, 72, generator=g) * 2.0 ** torch.randint(-9, 9, (69, 72), generator=g)
    x[3], x[5, 7] = 0, -1e-30
    sizes, draw = (20, 0, 33, 16), Draw(11, torch.arange(69) * 3 + 5, 3)
    for both in (True, False):
        arguments = (SCHEMES_HERE[name], operand, x.to(dtype), sizes)
        ours = with_kernels(*arguments, draw=draw, both=both)
        scheme, *rest = arguments
        same(ours, scheme.quantize(*rest, draw=draw, both=both))


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "nvfp4_rht16"])
def test_references_have_the_same_bits(with_kernels, name: str):
    vectors = load_file(GOLDEN / f"{name}.safetensors")
    compared = 0
    for case in sorted({key.partition(".")[0] for key in vectors if key.endswith(".x")}):
        x = vectors[f"{case}.x"]
        multiple = 32 if name.startswith("mxfp8") else 16
        if x.shape[0] % multiple or x.shape[1] % multiple:
            continue
        scheme = MXFP8Scheme() if name.startswith("mxfp8") else NVFP4Scheme(stochastic=False)
        row, columnwise = with_kernels(scheme, "dy", x)
        signs = "" if name.startswith("mxfp8") else "signs."
        pairs = ((f"{case}.row", row, False), (f"{case}.{signs}col", columnwise, True))
        for key, side, is_columnwise in pairs:
            codes, scales = parts(side)[:2]
            if name.startswith("nvfp4"):
                packed = vectors[f"{key}.codes"]
                expected = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
            else:
                expected = vectors[f"{key}.codes"]
            assert torch.equal(codes.T if is_columnwise else codes, expected), key
            assert torch.equal(scales.T if is_columnwise else scales, vectors[f"{key}.scales"]), key
            compared += 1
    assert compared >= 6


def test_nothing_is_quantized_to_nothing(with_kernels):
    for scheme in SCHEMES_HERE.values():
        same(
            with_kernels(scheme, "x", torch.zeros(0, 32), (0, 0)),
            scheme.quantize("x", torch.zeros(0, 32), (0, 0)),
        )


@pytest.mark.gpu
def test_a_gpu_has_the_kernels():
    assert available.of_blocks(torch.empty(1, device="cuda")) is not None
    assert available.of_blocks(torch.empty(1)) is None
