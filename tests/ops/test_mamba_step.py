import importlib
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron.ops.mamba_step import Weights, mamba_step, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Sizes(NamedTuple):
    rows: int
    heads: int = 4
    head_dim: int = 16
    groups: int = 2
    state: int = 16
    width: int = 4
    limit: tuple[float, float] = (0.0, math.inf)
    bias: bool = True


# one row and many, sizes that are no power of two, one group, other widths, limits that bind
SIZES = [
    Sizes(1),
    Sizes(3, heads=6, head_dim=20, groups=3, state=24, width=3, limit=(0.3, 0.6)),
    Sizes(5, heads=3, head_dim=8, groups=1, state=40, width=2, bias=False),
    Sizes(2, heads=2, head_dim=64, groups=1, state=128),
    Sizes(32, heads=2, head_dim=16, groups=2, state=16),
]


class Call(NamedTuple):
    xBC: Tensor
    dt: Tensor
    conv: Tensor
    ssm: Tensor
    slots: Tensor | None
    weights: Weights

    def to(self, dtype: torch.dtype) -> "Call":
        """Return copies in another dtype, parameters included."""
        weights = Weights(
            *[t.to(dtype) if isinstance(t, Tensor) else t for t in self.weights[:-1]],
            self.weights.time_step_limit,
        )
        tensors = (t.clone().to(dtype) for t in self[:4])
        return Call(*tensors, self.slots, weights)


def draw(sizes: Sizes, dtype: torch.dtype = torch.float32, *, in_order: bool = False) -> Call:
    g = torch.Generator().manual_seed(sum(sizes[:6]))
    rows, heads, head_dim, groups, state, width = sizes[:6]
    inner = heads * head_dim
    channels = inner + 2 * groups * state
    # the cuts of a projection, whose rows are longer
    projected = torch.randn(rows, inner + channels + heads, generator=g).to(DEVICE, dtype)
    _, xBC, dt = projected.split([inner, channels, heads], dim=1)
    conv = torch.randn(rows + 3, width - 1, channels, generator=g).to(DEVICE, dtype)
    ssm = torch.randn(rows + 3, heads, head_dim, state, generator=g).to(DEVICE)
    # a column of what a step is given
    numbers = torch.randperm(3 * rows + 9, generator=g)[: 3 * rows].view(rows, 3) % (rows + 3)
    numbers[:, 1] = torch.randperm(rows + 3, generator=g)[:rows]
    slots = None if in_order else numbers.to(DEVICE)[:, 1]
    weights = Weights(
        torch.randn(channels, width, generator=g).to(DEVICE),
        torch.randn(channels, generator=g).to(DEVICE) if sizes.bias else None,
        torch.randn(heads, generator=g).to(DEVICE),
        torch.rand(heads, generator=g).to(DEVICE),
        torch.randn(heads, generator=g).to(DEVICE),
        sizes.limit,
    )
    return Call(xBC, dt, conv, ssm, slots, weights)


def far(found: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(found).all()
    return ((found.double() - exact.double()).abs().max() / exact.abs().max()).item()


def kernel(call: Call) -> Tensor:
    pytest.importorskip("triton")
    found = importlib.import_module("nemotron.ops.mamba_step.triton").mamba_step(*call)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_the_references(sizes: Sizes, in_order: bool):
    call = draw(sizes, in_order=in_order)
    exact, ours = call.to(torch.float64), call.to(torch.float32)
    y, y_ours = reference(*exact), kernel(ours)
    # float32 sums of 128 products
    assert far(y_ours, y) <= 5e-6
    assert far(ours.ssm, exact.ssm) <= 1e-6
    assert torch.equal(ours.conv.double(), exact.conv)


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_bfloat16_is_rounded_once(sizes: Sizes):
    call = draw(sizes, torch.bfloat16)
    exact = call.to(torch.float64)
    y, y_ours = reference(*exact), kernel(call)
    assert y_ours.dtype == torch.bfloat16
    # the interpreter truncates to bfloat16
    assert far(y_ours, y) <= 2**-7
    assert far(call.ssm, exact.ssm) <= 1e-6
    assert torch.equal(call.conv.double(), exact.conv)


def test_a_state_of_16_bits_is_rounded_once():
    call = draw(SIZES[1])
    call = call._replace(ssm=call.ssm.half())
    exact = call.to(torch.float64)
    y, y_ours = reference(*exact), kernel(call)
    # what is read out is not rounded
    assert far(y_ours, y) <= 5e-6
    assert far(call.ssm, exact.ssm) <= 2**-11


def test_other_slots_are_left_alone():
    call = draw(SIZES[1])
    assert call.slots is not None
    others = [k for k in range(call.conv.shape[0]) if k not in call.slots.tolist()]
    for tensor in (call.conv, call.ssm):
        tensor[others] = math.nan
    kept = call.conv.clone(), call.ssm.clone()
    assert kernel(call).isfinite().all()
    for now, before in zip((call.conv, call.ssm), kept, strict=True):
        assert torch.equal(now[others].nan_to_num(7.0), before[others].nan_to_num(7.0))
        assert now[call.slots].isfinite().all()


@pytest.mark.parametrize("function", ["reference", "kernel"])
def test_steps_are_the_recurrence_of_the_paper(function: str):
    """Steps of one token against convolution and sum over the past, written out in float64."""
    sizes, length = Sizes(2, heads=4, head_dim=8, groups=2, state=8), 6
    call = draw(sizes, in_order=True)
    inner, size = 32, 8
    call.conv.zero_()
    call.ssm.zero_()
    inputs = [draw(sizes._replace(width=4 + k)) for k in range(length)]
    found = []
    for other in inputs:
        given = call._replace(xBC=other.xBC, dt=other.dt)
        found.append(reference(*given) if function == "reference" else kernel(given))
    xBC = torch.stack([other.xBC for other in inputs], dim=2).double()  # [B, C, T]
    dt = torch.stack([other.dt for other in inputs], dim=1).double()
    weights = call.to(torch.float64).weights
    filter_, bias = weights.conv.unsqueeze(1), weights.conv_bias
    mixed = F.silu(F.conv1d(F.pad(xBC, (3, 0)), filter_, bias, groups=xBC.shape[1])).mT
    dt = (1 + (dt + weights.dt_bias).exp()).log()
    x = mixed[..., :inner].unflatten(2, (4, 8))
    B, C = (
        mixed[..., begin : begin + 2 * size].unflatten(2, (2, size)).repeat_interleave(2, dim=2)
        for begin in (inner, inner + 2 * size)
    )
    passed = (-dt * weights.A_log.exp()).cumsum(1)
    shares = (passed[:, :, None] - passed[:, None]).exp() * torch.ones(
        length, length, dtype=torch.float64, device=DEVICE
    ).tril()[None, :, :, None]
    alike = torch.einsum("bthn,bshn->btsh", C, B)
    y = torch.einsum("btsh,bsh,bshp->bthp", shares * alike, dt, x) + weights.D[:, None] * x
    assert far(torch.stack(found, dim=1), y.flatten(2)) <= 5e-6


def test_no_rows_give_no_rows():
    call = draw(Sizes(0), in_order=True)
    before = call.ssm.clone()
    assert kernel(call).shape == (0, 64)
    assert torch.equal(call.ssm, before)


def test_a_cpu_takes_the_reference():
    call = draw(SIZES[0])
    cpu = Call(*[t.cpu() if isinstance(t, Tensor) else t for t in call[:5]], call.weights)
    if DEVICE == "cpu":
        assert not mamba_step.takes(cpu.xBC)


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device(no_waits):
    call = draw(SIZES[0], torch.bfloat16)
    kernel(call)  # compiles
    with no_waits():
        kernel(call)
