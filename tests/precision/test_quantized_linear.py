"""The three products of a quantized layer: the right operands, the right sums, the right memory."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nemotron.precision.linear import quantized_grouped_linear, quantized_linear
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import SCHEMES, NVFP4Scheme
from tests.support.operands import decoded, product

DRAW = Draw(11)


def inputs(tokens: int = 48, width: int = 80, out: int = 112, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g).bfloat16()
    weight = torch.randn(out, width, generator=g) / 8
    dy = (torch.randn(tokens, out, generator=g) * 1e-3).bfloat16()
    return x, weight, dy


def run(function, x, weight, dy, *rest):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight, *rest)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("name", SCHEMES)
def test_products_are_those_of_the_decoded_operands_in_float64(name: str):
    x, weight, dy = inputs()
    scheme = SCHEMES[name]
    row, columnwise = scheme.quantize("w", weight.bfloat16())
    dy_row, dy_columnwise = scheme.quantize("dy", dy, draw=DRAW)
    expected = {
        "y": product(scheme.quantize("x", x)[0], row),
        "dx": product(dy_row, columnwise),
        "dw": product(dy_columnwise, scheme.quantize("x", x)[1]),
    }
    wide = run(quantized_linear, x.float(), weight, dy.float(), scheme, DRAW)
    for found, (_, exact) in zip(wide, expected.items(), strict=True):
        # float32 sums of at most 112 terms
        assert (found.double() - exact).abs().max() <= 1e-6 * exact.abs().max()
    narrow = run(quantized_linear, x, weight, dy, scheme, DRAW)
    assert [t.dtype for t in narrow] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert torch.equal(narrow[0], wide[0].bfloat16())


@pytest.mark.parametrize(("name", "error"), [("nvfp4", 0.2), ("mxfp8", 0.06), ("fp8_current", 0.08),
                                             ("fp8_block", 0.06)])  # fmt: skip
def test_errors_are_those_of_the_format(name: str, error: float):
    x, weight, dy = inputs(tokens=128)
    exact = run(lambda x, w: x @ w.T, x.float(), weight, dy.float())
    found = run(quantized_linear, x.float(), weight, dy.float(), SCHEMES[name], DRAW)
    for ours, theirs in zip(found, exact, strict=True):
        relative = ((ours - theirs).norm() / theirs.norm()).item()
        assert error / 5 < relative < error


def test_each_gradient_is_rounded_with_bits_of_its_own_and_repeatably():
    x, weight, dy = inputs()
    scheme = SCHEMES["nvfp4"]
    once = run(quantized_linear, x, weight, dy, scheme, DRAW)
    again = run(quantized_linear, x, weight, dy, scheme, DRAW)
    other = run(quantized_linear, x, weight, dy, scheme, Draw(12))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert torch.equal(once[0], other[0])
    assert not torch.equal(once[1], other[1])
    assert not torch.equal(once[2], other[2])


def test_the_mean_of_many_draws_is_nearer_than_rounding_to_nearest():
    x, weight, dy = inputs(tokens=64)
    exact = run(lambda x, w: x @ w.T, x.float(), weight, dy.float())[1]
    scheme = SCHEMES["nvfp4"]
    nearest = run(quantized_linear, x.float(), weight, dy.float(), scheme, None)[1]
    draws = [
        run(quantized_linear, x.float(), weight, dy.float(), scheme, Draw(n))[1] for n in range(50)
    ]
    # the weight's own error stays in both; compare with the product of its quantized form
    row = decoded(scheme.quantize("w", weight.bfloat16())[1]).float()
    exact = dy.float() @ row.T
    mean_error = (torch.stack(draws).mean(0) - exact).norm()
    assert mean_error < 0.5 * (nearest - exact).norm()


def test_tokens_that_fill_no_chunk_are_as_if_zeros_followed():
    x, weight, dy = inputs(tokens=35)
    scheme = SCHEMES["nvfp4"]
    found = run(quantized_linear, x.float(), weight, dy.float(), scheme, DRAW)
    pad = torch.nn.functional.pad
    padded = run(quantized_linear, pad(x, (0, 0, 0, 13)).float(), weight,
                 pad(dy, (0, 0, 0, 13)).float(), scheme, DRAW)  # fmt: skip
    assert torch.equal(found[0], padded[0][:35])
    assert torch.equal(found[1], padded[1][:35])
    # the same terms; float32 sums over another number of zeros
    assert (found[2] - padded[2]).abs().max() <= 1e-6 * found[2].abs().max()


@pytest.mark.parametrize("name", SCHEMES)
def test_experts_are_layers_of_their_own_and_one_without_rows_has_no_gradient(name: str):
    counts = torch.tensor([20, 0, 33, 16])
    x, _, dy = inputs(tokens=69)
    weight = torch.randn(4, 112, 80, generator=torch.Generator().manual_seed(4)) / 8
    scheme = SCHEMES[name]
    y, dx, dw = run(quantized_grouped_linear, x, weight, dy, counts, scheme, DRAW)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        start += count
        if not count:
            assert not dw[expert].any()
            continue
        alone = run(
            quantized_linear, x[rows], weight[expert], dy[rows], scheme,
            Draw(DRAW.key, rows.start),
        )  # fmt: skip
        assert torch.equal(alone[0], y[rows])
        assert torch.equal(alone[1], dx[rows])
        assert torch.equal(alone[2], dw[expert])


@pytest.mark.parametrize("name", SCHEMES)
def test_experts_that_are_all_idle_have_no_outputs_and_no_gradients(name: str):
    x, _, dy = inputs(tokens=0)
    counts, weight = torch.zeros(4, dtype=torch.int64), torch.randn(4, 112, 80)
    for experts in (slice(0, 1), slice(0, 4)):
        y, dx, dw = run(
            quantized_grouped_linear, x, weight[experts], dy, counts[experts], SCHEMES[name], DRAW
        )
        assert y.shape == (0, 112)
        assert dx.shape == (0, 80)
        assert not dw.any()


def held_by(node) -> int:
    """Bytes of tensors that a node of the graph holds but autograd does not know of."""
    held = [v for v in vars(node).values() if isinstance(v, torch.Tensor)]
    for side in (side for kept in node.kept for side in kept):
        held += [v for v in vars(side.matrix).values() if isinstance(v, torch.Tensor)]
    return sum(tensor.nbytes for tensor in held)


def test_only_the_quantized_operands_are_kept_for_backward():
    x, weight, dy = inputs(tokens=256, width=256, out=64)
    y = quantized_linear(x.requires_grad_(), weight.requires_grad_(), SCHEMES["nvfp4"], DRAW)
    node = y.grad_fn
    # 4.5 bits of X; of W its codes and a scale for each square; amaxes
    kept = 256 * 256 * 4.5 / 8 + 256 * 64 / 2 + 256 * 64 / 256 + 2 * 4
    assert sum(tensor.nbytes for tensor in node.saved_tensors) == kept
    assert held_by(node) == 0
    y.backward(dy)
    assert x.grad.isfinite().all()
    with pytest.raises(RuntimeError, match="freed"):
        _ = node.saved_tensors


@pytest.mark.parametrize("name", SCHEMES)
def test_operands_are_made_again_where_a_layer_is_recomputed(name: str):
    x, weight, dy = inputs(tokens=64)
    once = run(quantized_linear, x, weight, dy, SCHEMES[name], DRAW)

    def again(x, weight, *rest):
        y = checkpoint(quantized_linear, x, weight, *rest, use_reentrant=False)
        # what autograd keeps is then left to it, and nothing else is there
        assert held_by(y.grad_fn) == 0
        return y

    twice = run(again, x, weight, dy, SCHEMES[name], DRAW)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_ingredients_can_be_left_out():
    x, weight, dy = inputs()
    full = run(quantized_linear, x, weight, dy, NVFP4Scheme(), DRAW)
    for change in ({"hadamard": False}, {"stochastic": False}, {"square_weights": False}):
        other = run(quantized_linear, x, weight, dy, NVFP4Scheme(**change), DRAW)
        assert any(not torch.equal(a, b) for a, b in zip(full, other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
def test_a_gpu_quantizes_to_the_same_values(name: str):
    x, weight, dy = inputs()
    here = run(quantized_linear, x, weight, dy, SCHEMES[name], DRAW)
    there = run(quantized_linear, x.cuda(), weight.cuda(), dy.cuda(), SCHEMES[name], DRAW)
    for ours, theirs in zip(here, there, strict=True):
        # the same operands; float32 sums in another order, then one rounding to bfloat16
        assert (theirs.cpu().float() - ours.float()).norm() <= 2**-8 * ours.float().norm()
