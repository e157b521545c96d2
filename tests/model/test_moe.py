from dataclasses import replace

import pytest
import torch

from nemotron.model import moe
from nemotron.model.moe import Dispatched, MoE
from nemotron.ops.grouped_mlp import grouped_mlp, one_by_one
from nemotron.ops.registry import Backend
from tests.support.models import build_config


def build_layer(**changes: object) -> MoE:
    generator = torch.Generator().manual_seed(2)
    layer = MoE(build_config(**changes)).double()
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return layer


def draw(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, length, 24, generator=generator, dtype=torch.float64)


def by_token(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """Token after token, weights after the down projection as transformers has them."""
    routing = layer.gate(x.flatten(0, 1))
    results = []
    for t, u in enumerate(x.flatten(0, 1)):
        latent = u if layer.fc1_latent_proj is None else layer.fc1_latent_proj.weight @ u
        total = torch.zeros_like(latent)
        for expert, weight in zip(routing.experts[t], routing.weights[t], strict=True):
            hidden = (layer.experts.up_proj[expert] @ latent).relu() ** 2
            total = total + weight * (layer.experts.down_proj[expert] @ hidden)
        if layer.fc2_latent_proj is not None:
            total = layer.fc2_latent_proj.weight @ total
        shared = (layer.shared_experts.up_proj.weight @ u).relu() ** 2
        results.append(total + layer.shared_experts.down_proj.weight @ shared)
    return torch.stack(results).view_as(x)


@pytest.mark.parametrize("multiple", [1, 4, 64])
@pytest.mark.parametrize("latent", [None, 9])
def test_the_layer_is_a_loop_over_tokens(
    monkeypatch: pytest.MonkeyPatch, latent: int | None, multiple: int
):
    monkeypatch.setattr(moe, "row_multiple", lambda _: multiple)
    layer, x = build_layer(moe_latent_size=latent), draw(2, 13).requires_grad_()
    found, _ = layer(x)
    expected = by_token(layer, x)
    assert (found - expected).abs().max() <= 1e-12
    inputs = [x, *layer.parameters()]
    cotangent = torch.randn(found.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= 1e-11 * max(1.0, theirs.abs().max().item())


def test_no_token_is_dropped_when_all_want_the_same_experts():
    layer, x = build_layer(), draw(1, 40)
    layer.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 9, 0, 0, 0, 0]))
    assert layer.gate(x.flatten(0, 1)).counts.tolist() == [40, 40, 40, 0, 0, 0, 0]
    assert (layer(x)[0] - by_token(layer, x)).abs().max() <= 1e-12


def test_identity_projections_make_a_latent_layer_a_plain_one():
    plain, latent = build_layer(moe_latent_size=None), build_layer(moe_latent_size=24)
    with torch.no_grad():
        latent.fc1_latent_proj.weight.copy_(torch.eye(24))
        latent.fc2_latent_proj.weight.copy_(torch.eye(24))
        for part in ("gate", "experts", "shared_experts"):
            getattr(latent, part).load_state_dict(getattr(plain, part).state_dict())
    x = draw(2, 9)
    assert (plain(x)[0] - latent(x)[0]).abs().max() <= 1e-13


def test_bfloat16_stays_near_float64():
    layer, x = build_layer(), draw(2, 50)
    exact = layer(x)[0]
    narrow = layer.float()(x.bfloat16())[0]
    assert narrow.dtype == torch.bfloat16
    # a few tokens may choose another expert, because the router reads rounded inputs
    error = (narrow.double() - exact).norm() / exact.norm()
    assert error <= 3e-2


def test_experts_that_get_no_token_have_gradients_of_zero():
    """Other ranks wait for them."""
    layer = build_layer()
    x, nothing = draw(1, 5)[0, :, :9].requires_grad_(), torch.zeros(0, dtype=torch.long)
    weights = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    counts = torch.zeros(7, dtype=torch.long)
    y = layer.experts(Dispatched(x, nothing, nothing, weights, counts))
    assert torch.equal(y, torch.zeros(5, 9, dtype=torch.float64))
    inputs = [x, weights, *layer.experts.parameters()]
    for part, gradient in zip(inputs, torch.autograd.grad(y.sum(), inputs), strict=True):
        assert torch.equal(gradient, torch.zeros_like(part))


def test_experts_pass_through_one_operation_only_where_nothing_is_added_to_them():
    layer, x = build_layer(), draw(2, 13)
    expected, calls = by_token(layer, x), []

    def named(*inputs: torch.Tensor) -> torch.Tensor:
        calls.append(len(inputs))
        return one_by_one(*inputs)

    backends = [Backend("named", named, by_name=True), *grouped_mlp.backends]
    layer.experts.grouped_mlp = replace(grouped_mlp, backends=backends)
    assert (layer(x)[0] - expected).abs().max() <= 1e-12
    assert not calls  # no recipe names it
    layer.experts.grouped_mlp = layer.experts.grouped_mlp.bind("named")
    assert (layer(x)[0] - expected).abs().max() <= 1e-12
    assert len(calls) == 1
    # another product, as quantization has it
    vars(layer.experts)["multiply"] = layer.experts.multiply
    assert (layer(x)[0] - expected).abs().max() <= 1e-12
    assert len(calls) == 1
    del vars(layer.experts)["multiply"]
    layer(x)
    assert len(calls) == 2
