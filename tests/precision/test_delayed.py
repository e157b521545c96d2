"""Delayed scaling against Transformer Engine's kernel written out, and as part of a run's state."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron.checkpoint.find import locate
from nemotron.checkpoint.read import SavedTensors
from nemotron.checkpoint.state import SavedState
from nemotron.checkpoint.write import Content, save
from nemotron.model.hybrid import HybridLM
from nemotron.precision.apply import Quantization
from nemotron.precision.config import DelayedConfig, PrecisionConfig
from nemotron.precision.delayed import DelayedFP8Scheme, Histories
from nemotron.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
LENGTH = 4
EXPERTS = "backbone.layers.1.mixer.experts"
MAGNITUDES = st.one_of(
    st.just(0.0),
    st.just(math.inf),
    st.floats(2**-140, 2**-119, width=32),
    st.floats(2**-20, 2**20, width=32),
)


class Kernel:
    """One tensor of delayed_scaling.cu, kernel_bulk, number by number."""

    def __init__(self, largest: float, options: DelayedConfig) -> None:
        self.scaled_max = largest * 2.0**-options.margin
        self.algorithm, self.length = options.algorithm, options.history_length
        self.history, self.scale = [0.0] * self.length, 1.0

    def update(self) -> None:
        last, amax = self.history[0], 0.0
        if last != 0:
            rolled = []
            for i in range(self.length):
                a = self.history[i + 1] if i < self.length - 1 else last
                amax = max(amax, a)
                rolled.append(a if i > 0 else 0.0)
            self.history = rolled
        if self.algorithm == "most_recent":
            amax = last
        if math.isfinite(amax) and amax > 0:
            quotient = torch.tensor(self.scaled_max) / torch.tensor(amax)
            self.scale = min(quotient.item(), torch.finfo(torch.float32).max)


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@given(
    st.lists(st.tuples(MAGNITUDES, MAGNITUDES, MAGNITUDES), min_size=1, max_size=9),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_scales_and_histories_are_those_of_the_kernel(algorithm, steps, length, margin):
    options = DelayedConfig(history_length=length, algorithm=algorithm, margin=margin)
    histories = Histories({"layer": 1}, options, torch.device("cpu"))
    kernels = {"x": Kernel(448.0, options), "w": Kernel(448.0, options),
               "dy": Kernel(57344.0, options)}  # fmt: skip
    scheme = DelayedFP8Scheme(histories.slots("layer"))
    for magnitudes in steps:
        for (operand, kernel), amax in zip(kernels.items(), magnitudes, strict=True):
            scheme.remember(operand, torch.tensor([[amax / 2, -amax]]))
            kernel.history[0] = amax
            kernel.update()
        histories.roll(lambda amaxes: amaxes)
        found = dict(histories.tensors())
        for operand, kernel in kernels.items():
            assert found[f"layer.{operand}.amax_history"].tolist() == [kernel.history]
            assert found[f"layer.{operand}.scale"].tolist() == [kernel.scale]


def test_a_nan_leaves_no_trace_and_micro_batches_share_the_largest():
    histories = Histories({"layer": 1}, DelayedConfig(history_length=2), torch.device("cpu"))
    scheme = DelayedFP8Scheme(histories.slots("layer"))
    for micro_batch in ([1.0, -7.0], [2.0, 3.0], [math.nan, 9.0]):
        scheme.remember("x", torch.tensor([micro_batch]))
    histories.roll(lambda amaxes: amaxes)
    assert dict(histories.tensors())["layer.x.scale"].tolist() == [64.0]
    assert dict(histories.tensors())["layer.w.scale"].tolist() == [1.0]


def build(**changes) -> tuple[HybridLM, Quantization]:
    model = HybridLM(load_recipe(ROOT / "recipes/tiny/smoke.yaml").config.model)
    model.init_weights(1)
    model.compute_dtype = torch.bfloat16
    values = {"compute": "bf16", "preset": "fp8_delayed", "fp8_delayed": {"history_length": LENGTH}}
    return model, Quantization(model, PrecisionConfig.model_validate(values | changes), seed=3)


def micro_batch(model: HybridLM, first: int = 0) -> tuple[torch.Tensor, ...]:
    model.zero_grad()
    hidden = model(torch.arange(first, first + 64).view(2, 32))
    hidden.float().square().sum().backward()
    named = sorted(model.named_parameters())
    return hidden.detach(), *(p.grad for _, p in named if p.grad is not None)


def copied(quantization: Quantization) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in quantization.tensors().items()}


def test_every_matrix_has_a_history_and_scale_of_its_operands_from_the_start():
    model, quantization = build()
    found = quantization.tensors()
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    experts = model.config.n_routed_experts
    name = "precision.backbone.layers.0.mixer.in_proj"
    assert shapes[f"{name}.x.amax_history"] == (1, LENGTH)
    assert shapes[f"{name}.dy.scale"] == (1,)
    assert shapes[f"precision.{EXPERTS}.up_proj.w.amax_history"] == (experts, LENGTH)
    assert shapes[f"precision.{EXPERTS}.down_proj.w.scale"] == (experts,)
    assert len(shapes) == 6 * (
        len(quantization.table) + sum(line.kind == "moe.experts" for line in quantization.table)
    )
    assert all(t.eq(1).all() if n.endswith("scale") else t.eq(0).all() for n, t in found.items())
    micro_batch(model)
    quantization.begin(1, 0)
    after = quantization.tensors()
    assert {n: tuple(t.shape) for n, t in after.items()} == shapes
    assert all(found[n].data_ptr() == t.data_ptr() for n, t in after.items())
    weight = model.get_submodule("backbone.layers.0.mixer.in_proj").weight
    amax = weight.detach().bfloat16().abs().max().float()
    assert after[f"{name}.w.scale"].item() == torch.tensor(448.0) / amax
    assert after[f"{name}.x.scale"].item() != 1
    assert after[f"{name}.dy.scale"].item() > 1


def test_a_step_is_scaled_by_the_one_before_and_its_micro_batches_alike():
    model, quantization = build()
    micro_batch(model)
    before = copied(quantization)
    quantization.begin(0, 64)
    micro_batch(model, first=64)
    both = quantization.tensors()
    names = [name for name in both if name.endswith(".scale")]
    assert all(torch.equal(before[name], both[name]) for name in names)
    grown = [n for n in both if n.endswith("history") and (both[n] > before[n]).any()]
    assert grown
    assert not any((both[n] < before[n]).any() for n in both)
    quantization.begin(1, 0)
    assert sum(not torch.equal(before[name], both[name]) for name in names) > len(names) / 2


def test_a_pass_without_gradients_is_scaled_but_leaves_no_trace():
    model, quantization = build()
    micro_batch(model)
    quantization.begin(1, 0)
    before = copied(quantization)
    with torch.no_grad():
        model(torch.arange(64).view(2, 32) + 100)
    after = quantization.tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_layers_that_are_ever_scaled_with_delay_have_a_state():
    assert not build(preset="mxfp8")[1].tensors()
    rules = [{"format": "fp8_delayed", "kind": "mamba.out_proj"}]
    model, quantization = build(preset="bf16", rules=rules)
    assert {name.split(".mixer.")[1].split(".")[0] for name in quantization.tensors()} == {
        "out_proj"
    }
    later = [{"step": 2, "preset": "fp8_delayed"}]
    model, quantization = build(preset="bf16", switches=later)
    names = list(quantization.tensors())
    assert names == list(build()[1].tensors())
    micro_batch(model)
    quantization.begin(1, 0)
    assert not any(t.any() for n, t in quantization.tensors().items() if n.endswith("history"))
    assert quantization.begin(2, 0)
    micro_batch(model)
    assert any(t.any() for n, t in quantization.tensors().items() if n.endswith("history"))


def test_a_resumed_run_has_the_scales_of_one_that_never_stopped(tmp_path: Path):
    model, quantization = build()
    for step in range(3):
        quantization.begin(step, 0)
        micro_batch(model, first=64 * step)
    save(tmp_path, Content(3, copied(quantization), SavedState(), model.config), keep=1)
    quantization.begin(3, 0)
    expected = micro_batch(model)

    model, resumed = build()
    info = locate(tmp_path).info
    assert info is not None
    SavedTensors(info).load(resumed.tensors())
    # as a trainer does: the formats of the step that ended last, then the next one
    resumed.begin(2, 0)
    resumed.begin(3, 0)
    assert all(torch.equal(a, b) for a, b in zip(micro_batch(model), expected, strict=True))
    fresh = build()[0]
    assert not torch.equal(micro_batch(fresh)[0], expected[0])


def test_ranks_agree_on_the_largest_once_a_step():
    pairs = [build(), build()]
    for rank, (model, _) in enumerate(pairs):
        micro_batch(model, first=64 * rank)
    seen: list[torch.Tensor] = []

    def collect(amaxes: torch.Tensor) -> torch.Tensor:
        seen.append(amaxes)
        return amaxes

    alone = copied(pairs[0][1])
    for _, quantization in pairs:
        quantization.reduce_amax = collect
        quantization.begin(1, 0)
    assert len(seen) == 2
    assert seen[0].shape == (sum(t.numel() for n, t in alone.items() if n.endswith("scale")),)
    both = torch.maximum(*seen)
    results = []
    for rank in range(2):
        model, quantization = build()
        micro_batch(model, first=64 * rank)
        quantization.reduce_amax = lambda amaxes: both
        quantization.begin(1, 0)
        quantization.begin(1, 64)
        results.append(copied(quantization))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    own = pairs[0][1].tensors()
    assert any(not torch.equal(own[name], results[0][name]) for name in own)


def test_recomputing_a_block_changes_no_history():
    found = []
    for recompute in (False, True):
        model, quantization = build()
        for block in model.backbone.layers:
            block.recompute = recompute
        found.append((micro_batch(model), copied(quantization)))
    (gradients, state), (again, other) = found
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_experts_held_elsewhere_have_their_places_and_an_idle_one_keeps_its_scale():
    model, quantization = build()
    experts = model.get_submodule(EXPERTS)
    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(weight.detach()[2:5]))
    quantization.set_shard(EXPERTS, first_expert=2)
    counts = torch.tensor([3, 0, 4])
    x = torch.ones(7, experts.up_proj.shape[2], dtype=torch.bfloat16)
    y = experts.multiply(x, experts.up_proj, counts, torch.arange(7))
    y.backward(torch.full_like(y, 2.0))
    quantization.begin(1, 0)
    found = quantization.tensors()
    size = model.config.n_routed_experts
    for operand, scale in (("x", 448.0), ("dy", 57344.0 / 2)):
        scales = found[f"precision.{EXPERTS}.up_proj.{operand}.scale"]
        assert scales.tolist() == [scale if i in (2, 4) else 1.0 for i in range(size)]
