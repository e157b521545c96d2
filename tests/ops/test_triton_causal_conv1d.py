from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from nemotron.ops.causal_conv1d import causal_conv1d, reference
from nemotron.ops.causal_conv1d import triton as kernels
from tests.support.cases import further
from tests.support.convolution import documents, draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def short_strips(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let few tokens make several strips of several rounds."""
    monkeypatch.setattr(kernels, "STRIP_MULTIPLE", 8)
    with launched(unroll=4):
        yield


@contextmanager
def launched(**changes: int) -> Iterator[None]:
    """Launch with the defaults but for some parameters."""
    forward, backward = kernels.FORWARD, kernels.BACKWARD
    dtype = torch.float32
    with (
        forward.forced({**forward.default(dtype), **changes}),
        backward.forced({**backward.default(dtype), **changes}),
    ):
        yield


def moved(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.to(DEVICE) for t in inputs]


@pytest.mark.usefixtures("short_strips")
@pytest.mark.parametrize("with_state", [True, further(False)])
@pytest.mark.parametrize("with_documents", [True, False])
@pytest.mark.parametrize("length", [1, 3, 19])
def test_values_and_gradients_agree(length: int, with_documents: bool, with_state: bool):
    inputs = draw(2, length)
    inputs = inputs if with_state else [*inputs[:3], None]
    inputs.append(documents(2, length) if with_documents else None)
    exact = results(reference, doubled(inputs), True)
    # float32 sums of at most 38 numbers
    assert worst(results(kernels.causal_conv1d, moved(inputs), True), exact) <= 5e-6


@pytest.mark.usefixtures("short_strips")
@pytest.mark.parametrize("width", [1, 2, 5])
def test_without_bias_or_activation_and_with_other_widths(width: int):
    x, weight, _, state = draw(1, 13, channels=7, width=width)
    inputs = [x, weight, None, state, documents(1, 13)]
    exact = results(reference, doubled(inputs), False)
    # float32 sums of at most 13 numbers
    assert worst(results(kernels.causal_conv1d, moved(inputs), False), exact) <= 5e-6


def test_a_window_of_eight(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "STRIP_MULTIPLE", 16)
    inputs = [*draw(1, 12, channels=5, width=8), documents(1, 12)]
    exact = results(reference, doubled(inputs), True)
    # float32 sums of at most 12 numbers
    assert worst(results(kernels.causal_conv1d, moved(inputs), True), exact) <= 5e-6


def test_more_channels_and_tokens_than_a_program_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "STRIP_MULTIPLE", 16)
    inputs = [*draw(1, 18, channels=256 + 3)[:3], None, None]
    exact = results(reference, doubled(inputs), True)
    with launched(unroll=8, channels=256):
        found = results(kernels.causal_conv1d, moved(inputs), True)
    # float32 sums of at most 18 numbers
    assert worst(found, exact) <= 5e-6


def test_long_rows_make_no_more_strips_than_run_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "STRIP_MULTIPLE", 8)
    # two strips of 24 tokens forward, and of 29 backward, 3 of whose steps are the next one's
    assert (kernels._steps(43, 2), kernels._steps(43, 2, extra=3)) == (24, 32)
    inputs = [*draw(1, 43, channels=3)[:3], None, None]
    exact = results(reference, doubled(inputs), True)
    with launched(programs=2):
        found = results(kernels.causal_conv1d, moved(inputs), True)
    # float32 sums of at most 43 numbers
    assert worst(found, exact) <= 5e-6


@pytest.mark.usefixtures("short_strips")
def test_bfloat16_is_rounded_once_at_the_end():
    x, weight, bias, state = draw(2, 11)
    inputs = [x.bfloat16(), weight, bias, state.bfloat16(), documents(2, 11)]
    exact = results(reference, doubled(inputs), True)
    found = results(kernels.causal_conv1d, moved(inputs), True)
    # one rounding to 8 bits; the interpreter cuts off instead
    assert worst(found, exact) <= 2**-7
    # sums for the parameters are float32 from end to end
    assert worst(found[2:4], exact[2:4]) <= 5e-6


@pytest.mark.usefixtures("short_strips")
def test_slices_are_read_and_gradients_of_any_layout_taken():
    def sliced(function, x, weight, bias, state, ids):
        wide = torch.cat([x[..., :3], x, x[..., :2]], dim=-1)
        states = torch.cat([state, state], dim=-1)
        y = function(
            wide[..., 3:-2], weight.T.contiguous().T, bias, states[..., 10:], ids[:, ::2], True
        )
        return y.mT

    inputs = [*draw(2, 9), documents(2, 9).long().repeat_interleave(2, dim=1)]
    exact = results(lambda *args: sliced(reference, *args), doubled(inputs))
    found = results(lambda *args: sliced(kernels.causal_conv1d, *args), moved(inputs))
    # float32 sums of at most 18 numbers
    assert worst(found, exact) <= 5e-6


@pytest.mark.usefixtures("short_strips")
def test_changing_document_one_leaves_document_two_bit_equal():
    x, weight, bias, _ = moved(draw(1, 20))
    ids = (torch.arange(20, device=DEVICE) >= 9).int()[None]
    other = x.clone()
    other[:, :9] = torch.nan
    one, two = (kernels.causal_conv1d(t, weight, bias, None, ids, True) for t in (x, other))
    assert not torch.equal(one[:, :9], two[:, :9])
    assert torch.equal(one[:, 9:], two[:, 9:])


@pytest.mark.usefixtures("short_strips")
def test_only_wanted_gradients_are_computed():
    x, weight, bias, state = moved(draw(1, 10))
    inputs = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), state]
    y = kernels.causal_conv1d(*inputs, None, True)
    all_of_them = torch.autograd.grad(y.sum(), inputs[:3])
    y = kernels.causal_conv1d(x, weight.detach(), bias.detach(), state, None, True)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], all_of_them[0])
    y = kernels.causal_conv1d(x.detach(), weight.detach(), bias, state, None, True)
    assert torch.equal(torch.autograd.grad(y.sum(), bias)[0], all_of_them[2])


@pytest.mark.parametrize(
    ("total", "channels", "narrow"), [(64, 32, False), (68, 32, True), (64, 30, True)]
)
def test_a_slice_of_odd_strides_asks_for_a_backend_that_takes_it(
    monkeypatch: pytest.MonkeyPatch, total: int, channels: int, narrow: bool
):
    seen = {}

    def select(x: Tensor, **needs: bool):
        seen.update(needs)
        return reference

    monkeypatch.setattr(causal_conv1d, "select", select)
    x, weight, bias, _ = draw(1, 5, channels=total)
    causal_conv1d(x[..., :channels], weight[:channels], bias[:channels])
    assert seen["any_width"] is narrow
