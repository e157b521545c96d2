import platform
from pathlib import Path

import pytest
import torch
from against_reference import doubled, results, worst
from torch import Tensor

from nemotron.device import cpu_multiplies_bfloat16
from nemotron.model.linear import Head
from nemotron.ops.attention import attention
from nemotron.ops.config import OpsConfig
from nemotron.ops.describe import choose_backends, describe
from nemotron.ops.grouped_linear import grouped_linear
from nemotron.ops.linear import linear
from nemotron.ops.linear_cross_entropy import linear_cross_entropy, widened
from nemotron.ops.registry import Operation
from nemotron.ops.ssd import ssd

HALF_A_UNIT = 2**-8
"""Relative, in the last of the 8 bits of bfloat16."""
OPERATIONS = [linear, grouped_linear, attention, ssd]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_they_are_chosen_where_the_cpu_does_not_multiply_bfloat16(operation: Operation):
    backend = operation.backend("float32_products")
    assert backend.by_name == cpu_multiplies_bfloat16()
    choices = choose_backends(OpsConfig(), torch.device("cpu"), torch.bfloat16, documents=False)
    chosen = {choice.operation: choice.backend for choice in choices}[operation.name]
    assert (chosen == "float32_products") is not cpu_multiplies_bfloat16()
    named = OpsConfig(**{operation.name: "float32_products"})
    choices = choose_backends(named, torch.device("cpu"), torch.bfloat16, documents=False)
    assert any(f"{operation.name} float32_products" in line for line in describe(choices))


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(),
    reason="reads the flags of an x86 CPU under Linux",
)
def test_what_the_cpu_multiplies_is_what_linux_says():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert cpu_multiplies_bfloat16() == ("avx512_bf16" in flags or "amx_tile" in flags)


def test_a_dense_product_is_rounded_once_and_its_weight_gradient_is_not():
    inputs = [draw(3, 5, 48).bfloat16(), draw(40, 48).bfloat16().float()]
    y, grad_x, grad_weight = results(linear.bind("float32_products"), inputs)
    exact = results(linear, doubled(inputs))
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (*[torch.bfloat16] * 2, torch.float32)
    assert worst([y, grad_x], exact[:2]) <= HALF_A_UNIT
    assert worst([grad_weight], exact[2:]) <= 1e-5  # products are exact in float32, sums are not


def test_a_float32_weight_is_rounded_before_the_product():
    x, weight = draw(7, 48).bfloat16(), draw(40, 48)
    rounded = linear.bind("float32_products")(x, weight.bfloat16().float())
    assert torch.equal(linear.bind("float32_products")(x, weight), rounded)
    assert not torch.equal(rounded.float(), x.float() @ weight.T)


@pytest.mark.parametrize("counts", [[64, 0, 31, 33], [0, 5], [9]])
def test_products_of_experts_are_rounded_once_and_their_weight_gradients_are_not(counts: list[int]):
    weight = draw(len(counts), 40, 48).bfloat16().float()
    inputs = [draw(sum(counts), 48).bfloat16(), weight, torch.tensor(counts)]
    y, grad_x, grad_weight = results(grouped_linear.bind("float32_products"), inputs)
    exact = results(grouped_linear, doubled(inputs))
    assert grad_weight.dtype == torch.float32
    assert worst([y, grad_x], exact[:2]) <= HALF_A_UNIT
    assert worst([grad_weight], exact[2:]) <= 1e-5


def test_attention_with_documents_is_rounded_once():
    q, k, v = draw(2, 9, 4, 8).bfloat16(), draw(2, 9, 2, 8).bfloat16(), draw(2, 9, 2, 8).bfloat16()
    ids = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3], [1] * 9])
    named = attention.bind("float32_products")
    found = results(lambda *qkv: named(*qkv, seq_idx=ids), [q, k, v])
    exact = results(lambda *qkv: attention(*qkv, seq_idx=ids), doubled([q, k, v]))
    assert worst(found, exact) <= HALF_A_UNIT


def test_the_scan_is_rounded_once():
    x, B, C = (draw(2, 70, n, 8).bfloat16() for n in (4, 2, 2))
    dt, A, D = draw(2, 70, 4).abs() * 0.1, -draw(4).abs(), draw(4)
    named = ssd.bind("float32_products")
    found = results(named, [x, dt, A, B, C, D])
    exact = results(ssd, doubled([x, dt, A, B, C, D]))
    assert worst(found, exact) <= HALF_A_UNIT


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_head_leaves_its_logits_in_float32(reduction: str):
    hidden, weight = draw(70, 48).bfloat16(), draw(96, 48).bfloat16().float()
    labels = torch.arange(70) % 96
    labels[3] = -100

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, reduction=reduction)

    y, grad_hidden, grad_weight = results(loss, [hidden, weight])
    exact = results(loss, doubled([hidden, weight]))
    rounding = 2**-6 if cpu_multiplies_bfloat16() else 1e-5  # else logits are bfloat16
    assert worst([grad_hidden], exact[1:2]) <= max(HALF_A_UNIT, rounding)
    assert worst([y, grad_weight], [exact[0], exact[2]]) <= rounding


def test_whole_distributions_are_compared_in_float32():
    head = Head(48, 96)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    hidden = draw(7, 48).bfloat16()
    seen = []
    head.compare(hidden, lambda logits, rows: seen.append(logits) or logits.float().sum())
    exact = hidden.double() @ head.weight.detach().bfloat16().double().T
    rounding = HALF_A_UNIT if cpu_multiplies_bfloat16() else 1e-6
    assert worst([seen[0].detach()], [exact]) <= rounding


def test_other_dtypes_are_left_as_they_are():
    x, weight = draw(3, 8), draw(4, 8)
    assert widened(x, weight) == (x, weight)
    narrow, wide = widened(x.bfloat16(), weight)
    assert narrow.dtype == wide.dtype or cpu_multiplies_bfloat16()
