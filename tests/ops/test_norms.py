import pytest
import torch
import torch.nn.functional as F
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.ops.rms_norm import fused, gated_fused, gated_reference, reference

SHAPES = [(1, 12), (3, 5, 12), (2, 700, 24)]


def draw(shape: tuple[int, ...], count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    scale = torch.exp(torch.empty(*shape[:-1], 1).uniform_(-6, 3, generator=g))
    inputs = [torch.randn(shape, generator=g) * scale for _ in range(count)]
    return [*inputs, torch.randn(shape[-1], generator=g)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_is_torchs(shape: tuple[int, ...]):
    inputs = draw(shape, 1)

    def torchs(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    exact = results(torchs, doubled(inputs), 1e-5)
    assert worst(results(reference, doubled(inputs), 1e-5), exact) <= 1e-13
    assert worst(results(fused, doubled(inputs), 1e-5), exact) <= 1e-13
    assert worst(results(fused, inputs, 1e-5), exact) <= 5e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 3, 4])
def test_the_gated_norm_gates_first_and_norms_each_group(shape: tuple[int, ...], groups: int):
    inputs = draw(shape, 2)

    def plain(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        parts = (y * F.silu(z)).chunk(groups, dim=-1)
        return torch.cat([F.rms_norm(p, p.shape[-1:], None, eps) for p in parts], -1) * weight

    exact = results(plain, doubled(inputs), groups, 1e-5)
    assert worst(results(gated_reference, doubled(inputs), groups, 1e-5), exact) <= 1e-12
    assert worst(results(gated_fused, doubled(inputs), groups, 1e-5), exact) <= 1e-12
    assert worst(results(gated_fused, inputs, groups, 1e-5), exact) <= 1e-5


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_bfloat16_is_rounded_once_at_the_end(backend: str):
    x, weight = draw((4, 64), 1)
    function = {"reference": reference, "fused": fused}[backend]
    y = function(x.bfloat16(), weight, 1e-5)
    exact = reference(x.bfloat16().double(), weight.double(), 1e-5)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.float().bfloat16())
    y, z, weight = draw((4, 64), 2)
    inputs = [y.bfloat16(), z.bfloat16(), weight]
    exact = results(gated_reference, doubled(inputs), 4, 1e-5)
    function = {"reference": gated_reference, "fused": gated_fused}[backend]
    assert worst(results(function, inputs, 4, 1e-5), exact) <= 2**-8
