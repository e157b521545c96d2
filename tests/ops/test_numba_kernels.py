"""Kernels for CPUs: values and gradients beside the reference, bits, and who gets to use them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.errors import UserError
from nemotron.ops import (
    attention,
    causal_conv1d,
    linear_cross_entropy,
    rms_norm,
    squared_relu,
    ssd,
)
from nemotron.ops.apply import ALL, apply
from nemotron.ops.config import OpsConfig
from nemotron.ops.describe import choose_backends
from nemotron.ops.registry import Call
from tests.support.models import build, gradients, tokens

pytest.importorskip("numba", reason="numba is not installed")
from nemotron.ops.attention import numba as attention_kernels
from nemotron.ops.causal_conv1d import numba as conv_kernels
from nemotron.ops.linear_cross_entropy import numba as loss_kernels
from nemotron.ops.rms_norm import numba as norm_kernels
from nemotron.ops.squared_relu import numba as activation_kernels
from nemotron.ops.ssd import numba as scan_kernels

NAMED = (
    *("attention", "causal_conv1d", "gated_rms_norm", "grouped_linear", "grouped_mlp", "linear"),
    *("linear_cross_entropy", "rms_norm", "squared_relu", "ssd"),
)
SCANS = [(2, 1, 4, 2, 32, 48), (2, 70, 4, 2, 64, 16), (1, 150, 2, 1, 16, 16), (3, 33, 3, 3, 96, 32)]
"""Rows, tokens, heads, groups, size of a head and of its state."""
ATTENTIONS = [
    *[(1, 1, 1, 1, 1, 8), (2, 63, 63, 4, 2, 32), (1, 700, 700, 6, 2, 20), (2, 5, 80, 4, 4, 64)],
    *[(1, 150, 201, 4, 1, 128), (3, 1, 90, 8, 1, 17)],
]
"""Rows, queries, keys, heads of queries and of keys, size of a head."""
LOSSES = [(1, 12, 37), (7, 16, 16), (600, 300, 70), (1100, 33, 130), (70, 24, 5000)]
"""Tokens, size of their vectors, and of the vocabulary."""


class Draw:
    """Draws numbers, the same ones each time."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def documents(self, rows: int, length: int) -> Tensor:
        begins = torch.rand(rows, length, generator=self.generator) < 0.15
        return begins.int().cumsum(1).int()  # some rows begin with document 1


def scan(rows: int, length: int, heads: int, groups: int, size: int, places: int) -> list[Tensor]:
    """x, dt, A, B, C, D, initial state; time steps and decays over their whole useful range."""
    d = Draw(length)
    dt = torch.empty(rows, length, heads).uniform_(-9, 1, generator=d.generator).exp()
    A = -torch.empty(heads).uniform_(-1, 3, generator=d.generator).exp()
    B, C = (d.normal(rows, length, groups, places) for _ in range(2))
    x, state = d.normal(rows, length, heads, size), d.normal(rows, heads, size, places)
    return [x, dt, A, B, C, d.normal(heads), state]


def convolution(rows: int, length: int, channels: int = 10, width: int = 4) -> list[Any]:
    d = Draw(length)
    shapes = [(rows, length, channels), (channels, width), (channels,), (rows, width - 1, channels)]
    return [d.normal(*shape) for shape in shapes]


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("shape", SCANS)
def test_the_scan_is_the_recurrence(shape: tuple[int, ...], with_documents: bool):
    inputs = scan(*shape)
    ids = Draw(1).documents(*shape[:2]) if with_documents else None
    exact = results(ssd.reference, doubled(inputs), ids)
    # as the chunks in test_ssd.py; dA is a sum over all tokens, in which digits cancel
    assert worst(results(scan_kernels.ssd, inputs, ids), exact) <= 1e-5
    without = [*inputs[:6], None]
    exact = results(ssd.reference, doubled(without), ids)
    assert worst(results(scan_kernels.ssd, without, ids), exact) <= 1e-5


def test_long_memories_keep_their_digits():
    inputs = scan(1, 1500, 2, 1, 32, 16)
    inputs[1] = torch.full_like(inputs[1], 1e-4)  # a decay of 0.9999, which float32 rounds by 3e-8
    exact = results(ssd.reference, doubled(inputs), None)
    # the reference in float32 is off by 3e-5
    assert worst(results(scan_kernels.ssd, inputs, None), exact) <= 1e-5


def test_extreme_decays_neither_overflow_nor_lose_the_gradient():
    inputs = scan(1, 100, 2, 1, 32, 16)
    inputs[1] = torch.cat([torch.full((1, 50, 2), 50.0), torch.full((1, 50, 2), 1e-6)], dim=1)
    exact = results(ssd.reference, doubled(inputs), None)
    assert worst(results(scan_kernels.ssd, inputs, None), exact) <= 1e-5


def test_a_scan_of_bfloat16_is_that_of_float32_rounded():
    inputs = scan(2, 70, 4, 2, 32, 16)
    narrow = [t.bfloat16() if i in NARROW["scan"] else t for i, t in enumerate(inputs)]
    wide = [t.float() for t in narrow]
    for y, exact in zip(
        scan_kernels.ssd(*narrow, None), scan_kernels.ssd(*wide, None), strict=True
    ):
        assert torch.equal(y, exact.to(y.dtype))
    slope = Draw(3).normal(2, 70, 4, 32).bfloat16()
    for leaves in (narrow, wide):
        for leaf in leaves:
            leaf.requires_grad_()
    found, exact = (
        torch.autograd.grad(scan_kernels.ssd(*leaves, None)[0], leaves, slope.to(leaves[0].dtype))
        for leaves in (narrow, wide)
    )
    for ours, other in zip(found, exact, strict=True):
        assert torch.equal(ours, other.to(ours.dtype))


def test_a_scan_passes_on_what_is_not_a_number():
    for dtype in (torch.float32, torch.bfloat16):
        x, dt, A, B, C, D, state = scan(1, 70, 2, 1, 16, 16)
        x, B, C = (t.to(dtype) for t in (x, B, C))
        x[0, 40, 1, 3] = torch.nan
        y, last = scan_kernels.ssd(x, dt, A, B, C, D, state, None)
        assert y[0, 40:, 1, 3].isnan().all()
        assert not y[0, :32].isnan().any()  # the chunk before
        assert last[0, 1, 3].isnan().all()
        assert y[..., 0, :].isfinite().all()


def test_no_document_sees_another_ones_numbers():
    inputs, ids = scan(1, 90, 2, 1, 32, 16), (torch.arange(90) >= 37).int()[None]
    other = [t.clone() for t in inputs]
    for position in (0, 1, 3, 4):
        other[position][:, :37] = other[position][:, :37].flip(1) * 1.5 + 0.1
    one, two = (results(scan_kernels.ssd, tensors, ids) for tensors in (inputs, other))
    assert not torch.equal(one[0][:, :37], two[0][:, :37])
    assert torch.equal(one[0][:, 37:], two[0][:, 37:])
    assert torch.equal(one[1], two[1])
    for grad in (2, 3, 5, 6):  # x, dt, B, C
        assert torch.equal(one[grad][:, 37:], two[grad][:, 37:])


def attending(
    rows: int, length: int, total: int, heads: int, groups: int, size: int
) -> list[Tensor]:
    """q, k, v as slices of wider tensors, whose scores are far apart."""
    d = Draw(length)
    wide = d.normal(rows, total, heads + 2 * groups, size + 3)[..., 1:-2]
    q, k, v = wide.split([heads, groups, groups], dim=2)
    return [q[:, :length] * 3, k, v]


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("shape", ATTENTIONS)
def test_attention_agrees(shape: tuple[int, ...], with_documents: bool):
    inputs = attending(*shape)
    ids = Draw(1).documents(shape[0], shape[2]) if with_documents else None
    exact = results(attention.reference, doubled(inputs), ids, None)
    # as PyTorch's own in test_attention.py
    assert worst(results(attention_kernels.attention, inputs, ids, None), exact) <= 5e-6


def test_attention_takes_documents_of_many_blocks_and_slices():
    q, k, v = attending(1, 500, 500, 8, 2, 16)
    ids = (torch.arange(500) >= 130).int() + (torch.arange(500) >= 400).int()
    exact = results(attention.reference, doubled([q, k, v]), ids[None], None)
    found = results(attention_kernels.attention, [q, k, v], ids[None], None)
    assert worst(found, exact) <= 5e-6
    # `results` copies its inputs: here they lie in a wider tensor, and the gradient is transposed
    assert not k.is_contiguous()
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = attention_kernels.attention(*leaves, ids[None], None)
    assert torch.equal(y, found[0])
    slope = torch.randn(1, 8, 16, 500).permute(0, 3, 1, 2)
    one = torch.autograd.grad(y, leaves, slope, retain_graph=True)
    two = torch.autograd.grad(y, leaves, slope.contiguous())
    assert all(map(torch.equal, one, two))


def test_long_rows_keep_their_digits():
    inputs = [t.detach() for t in attending(1, 2000, 2000, 8, 1, 16)]
    inputs[0] = inputs[0] / 3  # a gradient of keys and values adds up all 16000 queries
    exact = results(attention.sdpa, doubled(inputs), None, None)
    assert worst(results(attention_kernels.attention, inputs, None, None), exact) <= 2e-6


def test_attention_does_not_read_behind_a_row():
    q, k, v = attending(3, 4, 150, 4, 2, 24)
    lengths = torch.tensor([150, 4, 77])
    exact = results(attention.reference, doubled([q, k, v]), None, lengths)
    for row, end in enumerate(lengths):
        k[row, end:], v[row, end:] = torch.nan, torch.inf
    found = results(attention_kernels.attention, [q, k, v], None, lengths)
    assert worst(found, exact) <= 5e-6
    ids = Draw(2).documents(3, 150)
    exact = results(attention.reference, doubled([q, *map(torch.nan_to_num, (k, v))]), ids, lengths)
    assert worst(results(attention_kernels.attention, [q, k, v], ids, lengths), exact) <= 5e-6


def test_no_query_sees_another_document():
    inputs, ids = attending(1, 90, 90, 4, 2, 32), (torch.arange(90) >= 37).int()[None]
    other = [torch.cat([t[:, :37].flip(1) * 1.5 + 0.1, t[:, 37:]], dim=1) for t in inputs]
    one, two = (results(attention_kernels.attention, t, ids, None) for t in (inputs, other))
    for first, second in zip(one, two, strict=True):
        assert not torch.equal(first[:, :37], second[:, :37])
        assert torch.equal(first[:, 37:], second[:, 37:])


def test_attention_passes_on_what_is_not_a_number():
    q, k, v = attending(1, 40, 40, 2, 1, 16)
    q[0, 20, 1, 3] = torch.nan
    y = attention_kernels.attention(q, k, v, None, None)
    assert y[0, 20, 1].isnan().all()
    assert y.isnan().sum() == 16
    k[0, 30, 0, 0] = torch.nan
    y = attention_kernels.attention(q, k, v, None, None)
    assert y[0, 30:].isnan().all()
    assert y.isnan().sum() == 16 * (1 + 20)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", [1, 3, 128, 300])
@pytest.mark.parametrize("channels", [10, 48])  # 48 make three whole vectors
def test_the_convolution_agrees(
    channels: int, length: int, with_documents: bool, with_state: bool, activation: bool
):
    inputs = convolution(2, length, channels)
    inputs = inputs if with_state else [*inputs[:3], None]
    ids = Draw(1).documents(2, length) if with_documents else None
    exact = results(causal_conv1d.reference, doubled(inputs), ids, activation)
    found = results(conv_kernels.causal_conv1d, inputs, ids, activation)
    assert worst(found, exact) <= 2e-6


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_convolution_takes_any_width_slices_and_no_bias(width: int):
    x, weight, _, state = convolution(2, 40, channels=7, width=width)
    wide = torch.zeros(2, 40, 19)
    wide[..., 5:12] = x
    exact = results(causal_conv1d.reference, doubled([x, weight, None, state]), None, True)
    inputs = [wide[..., 5:12], weight, None, state]
    assert worst(results(conv_kernels.causal_conv1d, inputs, None, True), exact) <= 2e-6
    sliced = conv_kernels.causal_conv1d(*inputs, None, True)
    assert worst([sliced], [exact[0]]) <= 2e-6


@pytest.mark.parametrize("shape", [(1, 12), (3, 5, 12), (2, 150, 24), (3, 228)])
def test_the_norms_agree(shape: tuple[int, ...]):
    d = Draw(sum(shape))
    scale = torch.exp(torch.empty(*shape[:-1], 1).uniform_(-6, 3, generator=d.generator))
    y, z, weight = d.normal(*shape) * scale, d.normal(*shape), d.normal(shape[-1])
    exact = results(rms_norm.reference, doubled([y, weight]), 1e-5)
    assert worst(results(norm_kernels.rms_norm, [y, weight], 1e-5), exact) <= 2e-6
    for groups in (1, 3, 4):
        exact = results(rms_norm.gated_reference, doubled([y, z, weight]), groups, 1e-5)
        found = results(norm_kernels.gated_rms_norm, [y, z, weight], groups, 1e-5)
        assert worst(found, exact) <= 2e-6


def test_the_activation_agrees():
    d = Draw()
    inputs = [d.normal(33, 21), d.normal(33, 1)]
    exact = results(squared_relu.reference, doubled(inputs))
    assert worst(results(activation_kernels.squared_relu, inputs), exact) <= 1e-6
    exact = results(squared_relu.reference, doubled(inputs[:1]), None)
    assert worst(results(activation_kernels.squared_relu, inputs[:1], None), exact) <= 1e-6


def predictions(tokens: int, size: int, vocab: int) -> list[Tensor]:
    """Vectors, weight, labels of which some are missing, and weights of the losses."""
    d = Draw(tokens)
    labels = torch.randint(vocab, (tokens,), generator=d.generator)
    labels[1:][torch.rand(tokens - 1, generator=d.generator) < 0.2] = -100
    weights = torch.rand(tokens, generator=d.generator)
    return [d.normal(tokens, size), d.normal(vocab, size) / size**0.5 * 3, labels, weights]


@pytest.mark.parametrize("blocks", [2, 1000])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", LOSSES)
def test_the_loss_agrees(
    shape: tuple[int, ...], weighted: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loss_kernels, "CHUNK_ELEMENTS", 64 * shape[2] * blocks)
    *inputs, weights = predictions(*shape)
    rest = ["sum", weights if weighted else None]
    exact = results(linear_cross_entropy.reference, doubled(inputs), *rest)
    found = results(loss_kernels.linear_cross_entropy, inputs, *rest)
    assert worst(found, exact) <= 2e-6
    narrow = [inputs[0].bfloat16(), inputs[1], inputs[2]]
    rounded = [narrow[0], inputs[1].bfloat16(), inputs[2]]
    exact = results(linear_cross_entropy.reference, doubled(rounded), *rest)
    for matrix in (narrow, rounded):
        loss, dx, dweight = results(loss_kernels.linear_cross_entropy, matrix, *rest)
        assert worst([dx], [exact[1]]) <= 2**-8
        assert worst([loss], [exact[0]]) <= 2e-6
        assert dweight.dtype == matrix[1].dtype
        assert worst([dweight], [exact[2]]) <= (2e-6 if matrix is narrow else 2**-8)


def test_a_loss_over_many_tokens_of_a_vocabulary_keeps_its_digits():
    *inputs, _ = predictions(3, 24, 100_000)
    exact = results(linear_cross_entropy.reference, doubled(inputs), "sum")
    assert worst(results(loss_kernels.linear_cross_entropy, inputs, "sum"), exact) <= 2e-6


def test_the_loss_has_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch):
    *inputs, weights = predictions(1100, 33, 130)
    before, found = torch.get_num_threads(), []
    for threads, blocks in ((1, 1), (1, 1000), (3, 1), (2, 5)):
        monkeypatch.setattr(loss_kernels, "CHUNK_ELEMENTS", 64 * 130 * blocks)
        torch.set_num_threads(threads)
        try:
            found.append(results(loss_kernels.linear_cross_entropy, inputs, "sum", weights))
        finally:
            torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_the_loss_computes_only_the_gradients_that_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    hidden, weight, labels, weights = predictions(200, 24, 50)
    loss, dx, dweight = results(
        loss_kernels.linear_cross_entropy, [hidden, weight, labels], "sum", weights
    )
    computed: list[set[str]] = []
    run = loss_kernels.run

    def seen(kernel: Any, record: Any, dtype: torch.dtype, values: dict[str, Any]) -> None:
        computed.append({"dx", "dweight"} & set(values))
        run(kernel, record, dtype, values)

    monkeypatch.setattr(loss_kernels, "run", seen)

    def one(*inputs: Tensor) -> Tensor:
        return loss_kernels.linear_cross_entropy(*inputs, labels, "sum", weights)

    found, alone = results(one, [hidden], *[weight])
    assert torch.equal(found, loss)
    assert torch.equal(alone, dx)
    found, alone = results(lambda w: one(hidden, w), [weight])
    assert torch.equal(found, loss)
    assert torch.equal(alone, dweight)
    with torch.no_grad():
        assert torch.equal(one(hidden.requires_grad_(), weight.requires_grad_()), loss)
    assert computed == [{"dx"}, {"dweight"}, set()]


def test_a_loss_without_labels_is_zero_and_a_label_outside_is_refused():
    hidden, weight, labels, _ = predictions(20, 24, 50)
    none = torch.full_like(labels, -100)
    found = results(loss_kernels.linear_cross_entropy, [hidden, weight, none], "sum")
    assert not any(tensor.any() for tensor in found)
    for label in (50, -1):
        labels[3] = label
        with pytest.raises(IndexError, match=f"label {label} is outside of a vocabulary of 50"):
            loss_kernels.linear_cross_entropy(hidden, weight, labels, "sum")


def test_a_loss_of_large_logits_does_not_overflow_and_passes_on_what_is_not_a_number():
    hidden, weight, labels, _ = predictions(100, 24, 50)
    exact = results(linear_cross_entropy.reference, doubled([hidden * 1e4, weight, labels]), "sum")
    found = results(loss_kernels.linear_cross_entropy, [hidden * 1e4, weight, labels], "sum")
    assert worst(found, exact) <= 1e-5
    hidden[0, 3] = torch.nan
    loss, dx, dweight = results(loss_kernels.linear_cross_entropy, [hidden, weight, labels], "sum")
    assert loss.isnan()
    assert dx[0].isnan().all()
    assert dx[1:].isfinite().all()
    assert dweight.isnan().all()


def test_losses_one_by_one_are_the_usual_ones():
    *inputs, weights = predictions(200, 24, 50)
    usual = results(linear_cross_entropy.chunked, inputs, "none", weights)
    found = results(loss_kernels.linear_cross_entropy, inputs, "none", weights)
    assert all(map(torch.equal, usual, found))


def calls() -> list[tuple[str, Callable[..., Any], Callable[..., Any], list[Any], tuple[Any, ...]]]:
    """Name, kernel, reference, inputs in float32, and the rest of each operation."""
    d = Draw(5)
    rows, ids = d.normal(300, 24), d.documents(2, 300)
    norm = [rows, d.normal(24)]
    gated = [d.normal(300, 24), rows, d.normal(24)]
    activation = [d.normal(300, 21), d.normal(300, 1)]
    attended = attending(2, 300, 300, 4, 2, 20)
    convolved, scanned = convolution(2, 300), scan(2, 70, 4, 2, 32, 16)
    return [
        ("attention", attention_kernels.attention, attention.reference, attended, (ids, None)),
        ("norm", norm_kernels.rms_norm, rms_norm.reference, norm, (1e-5,)),
        ("gated", norm_kernels.gated_rms_norm, rms_norm.gated_reference, gated, (3, 1e-5)),
        ("activation", activation_kernels.squared_relu, squared_relu.reference, activation, ()),
        ("conv", conv_kernels.causal_conv1d, causal_conv1d.reference, convolved, (ids, True)),
        ("scan", scan_kernels.ssd, ssd.reference, scanned, (ids[:, :70],)),
    ]


NARROW = {
    "attention": [0, 1, 2],
    "norm": [0],
    "gated": [0, 1],
    "activation": [0],
    "conv": [0],
    "scan": [0, 3, 4],
}
"""Inputs that have the dtype of activations."""


def test_bfloat16_is_rounded_once():
    for name, kernel, reference, inputs, rest in calls():
        narrow = [t.bfloat16() if i in NARROW[name] else t for i, t in enumerate(inputs)]
        exact = results(reference, doubled(narrow), *rest)
        found = results(kernel, narrow, *rest)
        # 2^-9 of the largest number
        assert worst(found, exact) <= 2**-8, name
        assert found[0].dtype == torch.bfloat16
    _, kernel, reference, (x, weight), rest = calls()[1]
    exact = reference(x.bfloat16().double(), weight.double(), *rest)
    assert torch.equal(kernel(x.bfloat16(), weight, *rest), exact.float().bfloat16())


def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    for name, kernel, _, inputs, rest in calls():
        found = []
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            try:
                found.append(results(kernel, inputs, *rest))
            finally:
                torch.set_num_threads(before)
        for others in found[1:]:
            assert all(map(torch.equal, found[0], others)), name


def test_they_are_used_only_where_a_recipe_names_them():
    for operation in ALL:
        if operation.name not in NAMED:
            continue
        call = Call("cpu", torch.float32)
        assert operation.choose(call).name != "numba"
        assert operation.bind("numba").choose(call).name == "numba"
    named = OpsConfig(**dict.fromkeys(NAMED, "numba"))
    chosen = choose_backends(named, torch.device("cpu"), torch.bfloat16, documents=True)
    assert {c.operation for c in chosen if c.backend == "numba"} >= set(NAMED)
    usual = choose_backends(OpsConfig(), torch.device("cpu"), torch.float32, documents=True)
    # nothing is said of what no recipe asks for
    assert not [other for c in usual if c.operation in NAMED for other in c.passed_over if
                other.backend == "numba"]  # fmt: skip


def test_a_scan_that_does_not_fit_says_which_sizes_do():
    x, dt, A, B, C, D, _ = scan(1, 5, 2, 1, 32, 16)
    named = ssd.ssd.bind("numba")
    with pytest.raises(UserError, match="takes heads and states of multiples of 16, not of 8 and"):
        named(x[..., :8], dt, A, B, C, D)


def test_a_model_gets_the_same_loss_and_gradients():
    model = build(dtype=torch.float32, mamba_num_heads=3, mamba_head_dim=32, ssm_state_size=16)
    found = []
    for ops in (OpsConfig(), OpsConfig(**dict.fromkeys(NAMED, "numba"))):
        apply(model, ops)
        loss = model(tokens(2, 40)).square().mean()
        found.append((loss.detach(), gradients(model, loss)))
    (one, usual), (two, ours) = found
    assert abs(one - two) <= 1e-6 * one
    for name, grad in usual.items():
        assert (grad - ours[name]).norm() <= 2e-5 * grad.norm() + 1e-9, name
