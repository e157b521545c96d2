"""Ranks that share a layer's tensors quantize them as one process does: scales and random bits."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemotron.model.hybrid import HybridLM
from nemotron.precision import backends
from nemotron.precision.apply import Quantization
from nemotron.precision.backends import BACKENDS
from nemotron.precision.config import PrecisionConfig
from nemotron.precision.linear import quantized_linear
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import SCHEMES, NVFP4Scheme, Scheme
from nemotron.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
KEY = 5
IN_PROJ = "backbone.layers.0.mixer.in_proj"


class AllReduce:
    """The largest over threads that stand for ranks, each of which calls in the same order."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=30)
        self._values: dict[int, torch.Tensor] = {}

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        self._values[threading.get_ident()] = value
        self._barrier.wait()
        found = torch.stack(list(self._values.values())).amax(0)
        self._barrier.wait()
        return found


def on_ranks(count: int, function):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))


def step(x, w, dy, scheme: Scheme, draw: Draw):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = quantized_linear(x, w, scheme, draw)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """The same operands: float32 sums in another order."""
    return bool((ours - theirs).abs().max() <= 1e-6 * theirs.abs().max())


def operands():
    g = torch.Generator().manual_seed(1)
    x, w, dy = (torch.randn(shape, generator=g) for shape in ((48, 256), (256, 256), (48, 256)))
    # the largest numbers are in one part only
    x[3, 7], w[200, 100], dy[5, 250] = 50.0, 9.0, 30.0
    return x, w, dy * 1e-3


@pytest.mark.parametrize("name", SCHEMES)
def test_columns_of_a_layer_give_its_columns(name: str):
    x, w, dy = operands()
    whole = step(x, w, dy, SCHEMES[name], Draw(KEY))
    reduce = {"w": AllReduce(2), "dy": AllReduce(2)}

    def rank(number: int):
        own = slice(128 * number, 128 * (number + 1))
        scheme = type(SCHEMES[name])(reduce=reduce)
        return step(x, w[own], dy[:, own], scheme, Draw(KEY, columns=own.start))

    parts = on_ranks(2, rank)
    assert near(torch.cat([y for y, _, _ in parts], 1), whole[0])
    assert near(sum(dx for _, dx, _ in parts), whole[1])
    assert near(torch.cat([dw for _, _, dw in parts]), whole[2])


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_of_a_layers_input_add_up_to_its_output(name: str):
    x, w, dy = operands()
    whole = step(x, w, dy, SCHEMES[name], Draw(KEY))
    reduce = {"x": AllReduce(2), "w": AllReduce(2)}

    def rank(number: int):
        own = slice(128 * number, 128 * (number + 1))
        return step(x[:, own], w[:, own], dy, type(SCHEMES[name])(reduce=reduce), Draw(KEY))

    parts = on_ranks(2, rank)
    assert near(sum(y for y, _, _ in parts), whole[0])
    assert near(torch.cat([dx for _, dx, _ in parts], 1), whole[1])
    assert near(torch.cat([dw for _, _, dw in parts], 1), whole[2])


@pytest.mark.parametrize("scheme", [SCHEMES["nvfp4"], SCHEMES["fp8_current"]])
def test_a_part_without_the_others_largest_number_differs(scheme: Scheme):
    x, w, dy = operands()
    alone = step(x, w[:128], dy[:, :128], scheme, Draw(KEY))[0]
    assert not near(alone, step(x, w, dy, scheme, Draw(KEY))[0][:, :128])


def test_tokens_dealt_to_ranks_are_rounded_as_in_the_whole_batch():
    _, _, dy = operands()
    scheme = NVFP4Scheme()
    whole, _ = scheme.quantize("dy", dy, draw=Draw(KEY))
    amax = dy.abs().amax().view(1)
    shared = NVFP4Scheme(reduce={"dy": lambda own: amax})
    for rows in (torch.arange(0, 48, 2), torch.arange(1, 48, 2), torch.randperm(48)):
        part, _ = shared.quantize("dy", dy[rows], draw=Draw(KEY, rows))
        assert torch.equal(part.operand().side(0), whole.operand().side(0)[rows])
    other, _ = shared.quantize("dy", dy[1::2], draw=Draw(KEY))
    assert not torch.equal(other.operand().side(0), whole.operand().side(0)[1::2])


def build(**changes) -> tuple[HybridLM, Quantization]:
    model = HybridLM(load_recipe(ROOT / "recipes/tiny/smoke.yaml").config.model)
    model.init_weights(1)
    model.compute_dtype = torch.bfloat16
    values = {"compute": "bf16", "preset": "nvfp4_all"} | changes
    return model, Quantization(model, PrecisionConfig.model_validate(values), seed=3)


def gradient(model: HybridLM, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    layer = model.get_submodule(IN_PROJ)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(dy)
    assert leaf.grad is not None
    return leaf.grad


def test_a_micro_batch_may_have_any_tokens_of_the_batch():
    model, quantization = build()
    weight = model.get_submodule(IN_PROJ).weight
    g = torch.Generator().manual_seed(2)
    x = torch.randn(64, weight.shape[1], generator=g).bfloat16()
    dy = torch.randn(64, weight.shape[0], generator=g).bfloat16()
    amax = dy.abs().amax().float().view(1)
    quantization.set_reduction(IN_PROJ, "dy", lambda own: amax)
    whole = gradient(model, x, dy)
    rows = torch.tensor([5, 60, 2, 33, 34, 7])
    quantization.begin(0, rows)
    assert near(gradient(model, x[rows], dy[rows]).float(), whole[rows].float())
    quantization.begin(0, 0)
    assert torch.equal(gradient(model, x, dy), whole)
    # a layer that sees some tokens of its micro-batch only
    quantization.begin(0, torch.arange(64).view(2, 32))
    quantization.set_shard(IN_PROJ, rows=lambda numbers: numbers[:, 16:])
    late = torch.cat([torch.arange(16, 32), torch.arange(48, 64)])
    assert near(gradient(model, x[late], dy[late]).float(), whole[late].float())
    quantization.begin(0, 32)
    with pytest.raises(AssertionError, match="some rows of a micro-batch without numbers"):
        gradient(model, x[32:], dy[32:])


def test_a_layers_part_outlasts_a_change_of_format():
    model, quantization = build(preset="bf16", switches=[{"step": 2, "preset": "nvfp4_all"}])
    seen = []

    def reduce(amax: torch.Tensor) -> torch.Tensor:
        seen.append(amax)
        return amax

    quantization.set_reduction(IN_PROJ, "w", reduce)
    quantization.begin(2, 0)
    layer = model.get_submodule(IN_PROJ)
    layer(torch.zeros(1, layer.weight.shape[1], dtype=torch.bfloat16))
    assert len(seen) == 1


def test_a_layer_that_ranks_share_gets_a_backend_that_can_share_in_every_format(monkeypatch):
    alone = replace(BACKENDS[-1], features=frozenset())
    monkeypatch.setattr(backends, "BACKENDS", (*BACKENDS[:-1], alone))
    _, quantization = build(preset="bf16", switches=[{"step": 2, "preset": "fp8_delayed"}])
    quantization.set_reduction(IN_PROJ, "w", lambda amax: amax)
    quantization.begin(2, 0)
    found = {line.module: line.backend for line in quantization.table}
    assert found.pop(IN_PROJ) == "torch"
    assert set(found.values()) == {"emulate"}


def test_a_stage_has_the_formats_and_histories_of_the_whole_model():
    values = {"preset": "fp8_delayed", "rules": [{"format": "bf16", "tail_blocks": 1},
              {"format": "mxfp8", "name": "backbone.layers.0.*"}]}  # fmt: skip
    whole, alone = build(**values)
    stage, _ = build(preset="bf16")
    blocks = {name: block for name, block in stage.backbone.layers.named_children() if name != "0"}
    stage.backbone.register_module("layers", torch.nn.ModuleDict(blocks))
    with torch.device("meta"):
        meta = HybridLM(whole.config)
    config = PrecisionConfig.model_validate({"compute": "bf16", **values})
    quantization = Quantization([stage], config, 3, meta)
    assert quantization.table == alone.table
    assert list(quantization.tensors()) == list(alone.tensors())
    assert {t.device.type for t in quantization.tensors().values()} == {"cpu"}
    for name, module in whole.named_modules():
        here = dict(stage.named_modules()).get(name)
        assert here is None or ("forward" in vars(here)) == ("forward" in vars(module))


def test_copies_that_have_numbers_are_rounded_alike_in_any_micro_batch():
    model, quantization = build()
    name = next(line.module for line in quantization.table if line.kind == "moe.experts")
    experts = model.get_submodule(name)
    num_copies = model.config.num_experts_per_tok
    draws = []
    for rows in (torch.arange(8), torch.tensor([6, 1, 7])):
        quantization.begin(4, rows)
        copies = quantization.copy_numbers(name, len(rows), num_copies)
        assert copies.shape == (len(rows), num_copies)
        draws.append(copies)
    first, second = draws
    assert torch.equal(second, first[[6, 1, 7]])
    numbers = torch.tensor([11, 3, 12, 40, 41])
    x = torch.randn(5, experts.up_proj.shape[2]).bfloat16().requires_grad_()
    counts = torch.tensor([2, 3] + [0] * (len(experts.up_proj) - 2))
    results = []
    for micro_batch in (0, 64):
        quantization.begin(4, micro_batch)
        x.grad = None
        y = experts.multiply(x, experts.up_proj, counts, numbers)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16())
        results.append(x.grad)
    assert torch.equal(*results)
    quantization.begin(4, 0)
    x.grad = None
    y = experts.multiply(x, experts.up_proj, counts, numbers + 1)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16())
    assert not torch.equal(x.grad, results[0])
