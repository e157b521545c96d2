import sys
import types

import pytest
import torch
import torch.nn.functional as F
from against_reference import doubled, results, worst

from nemotron.ops.causal_conv1d import blocked, cuda, reference
from tests.support.convolution import documents, draw


def test_the_reference_is_torchs_own_convolution():
    x, weight, bias, _ = doubled(draw(2, 30))
    y = reference(x, weight, bias, None, None, True)
    padded = F.pad(x.mT, (3, 0))
    theirs = F.silu(F.conv1d(padded, weight[:, None], bias, groups=10)).mT
    assert worst([y], [theirs]) <= 1e-14


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("with_documents", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 65, 300])
def test_values_and_gradients_agree(
    length: int, with_documents: bool, with_state: bool, activation: bool
):
    inputs = draw(2, length)
    inputs = inputs if with_state else [*inputs[:3], None]
    ids = documents(2, length) if with_documents else None
    exact = results(reference, doubled(inputs), ids, activation)
    assert worst(results(blocked, doubled(inputs), ids, activation), exact) <= 1e-13
    assert worst(results(blocked, inputs, ids, activation), exact) <= 5e-6


def test_without_bias_and_with_other_widths():
    for width in (1, 2, 5):
        x, weight, _, state = draw(2, 40, channels=7, width=width)
        inputs = [x, weight, None, state]
        exact = results(reference, doubled(inputs), None, True)
        assert worst(results(blocked, inputs, None, True), exact) <= 5e-6


def test_bfloat16_rounds_once():
    x, weight, bias, state = draw(2, 100)
    inputs = [x.bfloat16(), weight, bias, state.bfloat16()]
    exact = results(reference, doubled(inputs), None, True)
    assert worst(results(blocked, inputs, None, True), exact) <= 2**-8


def test_changing_document_one_leaves_document_two_bit_equal():
    x, weight, bias, _ = draw(1, 60)
    ids = (torch.arange(60) >= 23).int()[None]
    other = x.clone()
    other[:, :23] += 1
    one, two = (blocked(t, weight, bias, None, ids, True) for t in (x, other))
    assert not torch.equal(one[:, :23], two[:, :23])
    assert torch.equal(one[:, 23:], two[:, 23:])


def test_the_package_gets_its_own_layout(monkeypatch: pytest.MonkeyPatch):
    seen = {}

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
        seen.update(strides=x.stride(), activation=activation)
        state = None if initial_states is None else initial_states.mT
        return reference(x.mT, weight, bias, state, seq_idx, activation == "silu").mT

    module = types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn)
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    inputs, ids = draw(2, 9), documents(2, 9)
    for state, activation in ((inputs[3], True), (None, False)):
        y = cuda.causal_conv1d(*inputs[:3], state, ids, activation)
        assert torch.equal(y, reference(*inputs[:3], state, ids, activation))
        assert seen["strides"][1] == 1, "documents need the channels last in memory"


@pytest.mark.gpu
@pytest.mark.parametrize("with_documents", [False, True])
def test_the_kernel_of_the_package_agrees(with_documents: bool):
    pytest.importorskip("causal_conv1d", reason="causal-conv1d is not installed")
    x, weight, bias, _ = draw(2, 100, channels=64)
    ids = documents(2, 100) if with_documents else None
    exact = results(reference, [*doubled([x, weight, bias]), None, ids], True)
    inputs = [x.cuda(), weight.cuda(), bias.cuda(), None, None if ids is None else ids.cuda()]
    found = results(cuda.causal_conv1d, inputs, True)
    assert worst([t.cpu() for t in found], exact) <= 1e-5
