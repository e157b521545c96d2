import gc
import weakref

import torch
from torch import Tensor

from nemotron.ops import recompute


def double(x: Tensor, calls: list) -> tuple[Tensor, Tensor]:
    calls.append(torch.is_grad_enabled())
    return x.view_as(x), torch.exp(x)


def saved(x: Tensor, calls: list) -> Tensor:
    """Return a sum that keeps both results of an operation, the second one three times."""
    with recompute.saving():
        beside, y = recompute.call(double, x, calls)
        return (beside * beside).sum() + (y * y[:, 1:2]).sum()


def test_what_several_operations_keep_is_made_again_once():
    x, calls = torch.randn(3, 5, requires_grad=True), []
    saved(x, calls).backward()
    plain = x.detach().requires_grad_()
    y = plain.exp()
    ((plain * plain).sum() + (y * y[:, 1:2]).sum()).backward()
    assert torch.equal(x.grad, plain.grad)
    assert calls == [True, True]


def test_a_graph_that_is_kept_can_be_walked_twice():
    x, calls = torch.randn(3, 5, requires_grad=True), []
    loss = saved(x, calls)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, x)
    assert torch.equal(once, twice)
    assert len(calls) == 2


def test_nothing_outlives_a_graph():
    x = torch.randn(3, 5, requires_grad=True)
    gc.disable()
    try:
        for ends in (lambda loss: loss.backward(), lambda loss: None):
            inner = x * 2
            inputs = weakref.ref(inner.untyped_storage())
            loss = saved(inner, [])
            del inner
            assert inputs() is not None
            ends(loss)
            del loss
            assert inputs() is None
    finally:
        gc.enable()


def test_an_input_that_is_made_again_is_not_kept_either():
    kept = []
    x = torch.randn(3, 5, requires_grad=True)
    with recompute.saving(lambda tensor: kept.append(tensor.data_ptr()) or tensor):
        y = recompute.call(torch.neg, x)
        z = recompute.call(torch.neg, y)
        loss = (z * z).sum()
    assert set(kept) == {x.data_ptr()}
    loss.backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_what_nothing_before_it_trains_is_kept_as_it_is():
    x, weight, calls = torch.randn(3, 5), torch.randn(3, 5, requires_grad=True), []
    with recompute.saving():
        _, y = recompute.call(double, x, calls)
        (y * weight).sum().backward()
    assert torch.equal(weight.grad, x.exp())
    assert len(calls) == 1


def test_a_copy_of_another_dtype_is_kept():
    x, calls = torch.randn(3, 5, requires_grad=True), []
    with recompute.saving():
        _, y = recompute.call(double, x, calls)
        bits = y.detach().view(torch.int32)
        loss = (y.bfloat16() * torch.where(bits > 0, 1.0, 2.0)).sum()
    loss.backward()
    assert torch.equal(x.grad, x.detach().exp())
    assert len(calls) == 1
