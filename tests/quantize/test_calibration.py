"""Formats by role, what layers see, and a model that computes with fixed scales."""

import pytest
import torch
from torch import Tensor

from nemotron.data.batch import Batch
from nemotron.errors import UserError
from nemotron.model.hybrid import HybridLM
from nemotron.precision.fixed_scales import round_fp8, round_input, round_weight
from nemotron.precision.policy import kind_of
from nemotron.precision.scales import StoredFormat
from nemotron.precision.static import attach, detach, store_weights
from nemotron.quantize.calibrate import calibrate
from nemotron.quantize.histogram import Histogram
from nemotron.quantize.presets import (
    PRESETS,
    assign,
    find_input_observer,
    find_observer,
    find_preset,
)
from nemotron.quantize.scales import model_scales
from tests.support.models import build, tokens

SIZES = {
    "hidden_size": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 7,
    "num_attention_heads": 4,
    "head_dim": 12,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 32,
    "moe_latent_size": 16,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
}
LAYER = "backbone.layers"


def small(**changes: object) -> HybridLM:
    return build(dtype=torch.float32, **(SIZES | changes))


def batches(number: int = 3) -> list[Batch]:
    return [
        Batch(input_ids=ids, labels=ids, seq_idx=None)
        for ids in (tokens(2, 9, seed) for seed in range(number))
    ]


def recorded(model: HybridLM, name: str, ids: Tensor) -> Tensor:
    """Return the input of a module."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0]


# the table of the presets, written out again by hand
EXPECTED = {
    "fp8_conservative": {"experts": "fp8", "mamba": None, "attention": None, "latent": None},
    "fp8_aggressive": {"experts": "fp8", "mamba": "fp8", "attention": None, "latent": None},
    "super_fp8": {"experts": "fp8", "mamba": "fp8", "attention": None, "latent": None},
    "fp8": {"experts": "fp8", "mamba": "fp8", "attention": "fp8", "latent": "fp8"},
    "nvfp4_conservative": {"experts": "nvfp4", "mamba": None, "attention": None, "latent": None},
    "nvfp4_aggressive": {"experts": "nvfp4", "mamba": "nvfp4", "attention": None, "latent": None},
    "super_nvfp4": {"experts": "nvfp4", "mamba": "fp8", "attention": None, "latent": None},
    "ultra_nvfp4": {"experts": "nvfp4", "mamba": "fp8", "attention": None, "latent": None},
    "nvfp4": {"experts": "nvfp4", "mamba": "nvfp4", "attention": "nvfp4", "latent": "nvfp4"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_each_role_its_format(name: str):
    model, wanted = small(), EXPECTED[name]
    table = assign(model, PRESETS[name])
    assert table.get(f"{LAYER}.1.mixer.experts") == wanted["experts"]
    shared = "fp8" if wanted["mamba"] == "fp8" else wanted["experts"]
    assert table.get(f"{LAYER}.1.mixer.shared_experts.up_proj") == shared
    assert table.get(f"{LAYER}.1.mixer.fc1_latent_proj") == wanted["latent"]
    for part in "qkvo":
        assert table.get(f"{LAYER}.2.mixer.{part}_proj") == wanted["attention"]
    for part in ("in", "out"):
        assert table.get(f"{LAYER}.0.mixer.{part}_proj") == wanted["mamba"]
    assert not [name for name in table if name.startswith("mtp.") or kind_of(name) is None]
    assert PRESETS[name].cache == (name in ("super_fp8", "super_nvfp4", "ultra_nvfp4"))


def test_layers_are_kept_by_pattern():
    model = small()
    kept = assign(model, PRESETS["nvfp4"], [f"{LAYER}.0.*", "*.experts"])
    assert f"{LAYER}.1.mixer.experts" not in kept
    assert not [name for name in kept if name.startswith(f"{LAYER}.0.")]
    assert len(kept) == len(assign(model, PRESETS["nvfp4"])) - 3
    with pytest.raises(UserError, match="fits no linear layer"):
        assign(model, PRESETS["nvfp4"], ["*.expert"])
    odd = small(moe_intermediate_size=20)
    with pytest.raises(UserError, match=r"reads 16 and 20 values.*--keep 'backbone\.layers\.1\."):
        assign(odd, PRESETS["nvfp4"])
    assert assign(odd, PRESETS["nvfp4"], [f"{LAYER}.1.mixer.experts"])
    with pytest.raises(UserError, match="use one of fp8_conservative"):
        find_preset("int4")
    with pytest.raises(UserError, match="use one of max, mse"):
        find_observer("median", PRESETS["fp8"])


def test_calibration_sees_the_largest_of_all_batches():
    model, observed = small(), None
    observed = calibrate(model, batches())
    assert observed.tokens == 3 * 18
    for name in (f"{LAYER}.0.mixer.in_proj", f"{LAYER}.2.mixer.o_proj", f"{LAYER}.3.mixer.up_proj"):
        seen = [recorded(model, name, batch.input_ids).abs().max() for batch in batches()]
        assert observed.inputs[name] == max(seen)
        assert max(seen) > min(seen)
    inputs = [recorded(model, f"{LAYER}.2.mixer.k_proj", b.input_ids) for b in batches()]
    keys = [x @ model.get_submodule(f"{LAYER}.2.mixer.k_proj").weight.T for x in inputs]
    found = observed.cache[f"{LAYER}.2.mixer.k_proj"]
    assert found == pytest.approx(max(key.abs().max().item() for key in keys), rel=1e-6)
    assert all(hook not in vars(module) for module in model.modules() for hook in ("multiply",))


def test_experts_are_counted_and_share_the_scale_of_their_inputs():
    model = small()
    name = f"{LAYER}.1.mixer.experts"
    router = model.get_submodule(f"{LAYER}.1.mixer.gate")
    with torch.no_grad():
        router.e_score_correction_bias[5] = -100.0  # nothing reaches it
        router.e_score_correction_bias[3] = 100.0  # everything does
    observed = calibrate(model, batches())
    counts = observed.routed[name]
    assert counts.sum() == 2 * observed.tokens
    assert (counts[5], counts[3]) == (0, observed.tokens)
    assert observed.rare()[name][5] == 0
    assert 3 not in observed.rare()[name]
    assert all(n < 8 for n in observed.rare()[name].values())
    scales = model_scales(model, assign(model, PRESETS["nvfp4"]), observed)
    latents = [recorded(model, name, b.input_ids).x.abs().max() for b in batches()]
    for expert in range(12):
        scale = scales.linears[f"{name}.{expert}.up_proj"].input_scale
        assert scale.item() == pytest.approx(max(latents).item() / 2688, rel=1e-4)


def test_what_engines_fuse_shares_its_scales():
    model = small()
    observed = calibrate(model, batches())
    for preset, key in (("nvfp4", "weight_scale_2"), ("fp8", "weight_scale")):
        scales = model_scales(model, assign(model, PRESETS[preset]), observed).linears
        own = [scales[f"{LAYER}.2.mixer.{part}_proj"] for part in "qkv"]
        weights = [model.get_submodule(f"{LAYER}.2.mixer.{part}_proj").weight for part in "qkv"]
        largest = [weight.abs().max().item() for weight in weights]
        assert len({getattr(one, key).item() for one in own}) == 1
        assert len({one.input_scale.item() for one in own}) == 1
        divisor = 2688 if preset == "nvfp4" else 448
        assert getattr(own[0], key).item() == pytest.approx(max(largest) / divisor, rel=1e-4)
        assert len(set(largest)) > 1


@pytest.mark.parametrize("preset", ["fp8", "nvfp4", "super_nvfp4"])
def test_a_model_computes_with_rounded_weights_inputs_and_cache(preset: str):
    model = small()
    chosen = PRESETS[preset]
    observed = calibrate(model, batches())
    scales = model_scales(model, assign(model, chosen), observed, cache=chosen.cache)
    ids = tokens(2, 9, seed=5)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        plain = model(ids)
        # in training each call rounds the weights; stored ones are rounded already
        attach(model, scales, rounds_weights=True)
        through = model(ids)
        detach(model)
        assert torch.equal(model(ids), plain)
        store_weights(model, scales)
        attach(model, scales)
        stored = model(ids)
    assert torch.equal(through, stored)
    assert not torch.equal(stored, plain)
    name = f"{LAYER}.0.mixer.in_proj"
    x, own = recorded(model, name, ids), scales.linears[name]
    wanted = round_input(x.flatten(0, 1), own) @ round_weight(masters[name + ".weight"], own).T
    assert torch.equal(model.get_submodule(name)(x).flatten(0, 1), wanted)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, masters[name])}
    kept = {name for name in masters if kind_of(name.rpartition(".")[0]) is None}
    assert changed
    assert not changed & kept
    for part in "kv":
        scale = scales.cache.get(f"{LAYER}.2.mixer.{part}_proj.{part}_scale")
        assert (scale is None) == (not chosen.cache)
        if scale is not None:
            x = recorded(model, f"{LAYER}.2.mixer.{part}_proj", ids)
            y = model.get_submodule(f"{LAYER}.2.mixer.{part}_proj")(x)
            assert torch.allclose(y, (y / scale).to(torch.float8_e4m3fn).float() * scale)
            assert (y / scale).abs().max() <= 448


def test_experts_multiply_their_own_rounded_matrices():
    model = small()
    name = f"{LAYER}.1.mixer.experts"
    scales = model_scales(model, assign(model, PRESETS["nvfp4"]), calibrate(model, batches()))
    attach(model, scales, rounds_weights=True)
    experts = model.get_submodule(name)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(30, 16, generator=generator)
    counts = torch.tensor([4, 0, 3, 1, 2, 5, 0, 6, 2, 2, 1, 4])
    found = experts.multiply(rows, experts.up_proj, counts, None)
    parts = []
    for expert, part in enumerate(rows.split(counts.tolist())):
        own = scales.linears[f"{name}.{expert}.up_proj"]
        parts.append(round_input(part, own) @ round_weight(experts.up_proj[expert], own).T)
    assert torch.allclose(found, torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_gradients_pass_through_the_rounding_to_the_masters():
    model = small()
    scales = model_scales(model, assign(model, PRESETS["nvfp4"]), calibrate(model, batches()))
    ids = tokens(2, 9)

    def gradient() -> dict[str, Tensor]:
        model.zero_grad()
        model.lm_head.loss(model(ids), ids).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    attach(model, scales, rounds_weights=True)
    through = gradient()
    detach(model)
    store_weights(model, scales)
    attach(model, scales)
    stored = gradient()
    # what is rounded forward is constant backward: the gradient is that at the rounded weights
    assert through.keys() == stored.keys()
    for name, value in through.items():
        assert torch.allclose(value, stored[name], rtol=1e-4, atol=1e-5), name
        assert value.abs().max() > 0, name


def test_a_layer_without_a_finite_input_is_named():
    model = small()
    observed = calibrate(model, batches())
    observed.inputs[f"{LAYER}.0.mixer.in_proj"] = torch.tensor(float("nan"))
    with pytest.raises(UserError, match=r"layers\.0\.mixer\.in_proj saw no finite input"):
        model_scales(model, assign(model, PRESETS["fp8"]), observed)


def test_every_expert_may_read_all_tokens():
    model, name = small(n_group=2, topk_group=1), f"{LAYER}.1.mixer.experts"
    router = model.get_submodule(f"{LAYER}.1.mixer.gate")
    with torch.no_grad():
        router.e_score_correction_bias[5] = -100.0  # nothing reaches it
        model.get_submodule(name).up_proj[5] *= 50.0  # and it would answer with the largest values
    few = calibrate(model, batches())
    all_ = calibrate(model, batches(), every_expert=True)
    assert torch.equal(few.routed[name], all_.routed[name])
    assert all_.routed[name][5] == 0
    assert all_.inputs[f"{name}.down_proj"] > 10 * few.inputs[f"{name}.down_proj"]
    same = [key for key in few.inputs if not key.startswith(f"{LAYER}.1.mixer.experts")]
    assert all(few.inputs[key] == all_.inputs[key] for key in same)
    assert (router.top_k, router.num_groups) == (2, 2)
    # by hand: the weight of an expert among all of them
    largest = torch.zeros(())
    for batch in batches():
        x = recorded(model, f"{LAYER}.1.mixer", batch.input_ids).flatten(0, 1)
        latent = model.get_submodule(f"{LAYER}.1.mixer.fc1_latent_proj")(x)
        scores = (x @ router.weight.T).sigmoid()
        weights = scores / scores.sum(-1, keepdim=True) * router.scaling
        hidden = (latent @ model.get_submodule(name).up_proj[5].T).relu().square()
        largest = torch.maximum(largest, (hidden * weights[:, 5:6]).abs().max())
    torch.testing.assert_close(all_.inputs[f"{name}.down_proj"], largest.detach())


def test_a_histogram_knows_what_few_values_exceed():
    x = torch.randn(3, 40_000, generator=torch.Generator().manual_seed(0))
    histogram = Histogram()
    for part in (*x, torch.zeros(0)):
        histogram.add(part)
    assert histogram.counts.sum() == x.numel()
    assert histogram.largest == x.abs().max()
    # bins are at most a 64th wide
    wanted = torch.quantile(x.abs().flatten(), 0.999).item()
    assert wanted <= histogram.percentile(0.999).item() <= wanted * (1 + 1 / 32)
    assert histogram.percentile(1.0) == x.abs().max()


def test_an_outlier_is_clipped_where_that_lessens_the_error():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    x[7] = 100.0
    histogram = Histogram()
    histogram.add(x)
    found = histogram.mse()

    def error(amax: float) -> float:
        return (round_fp8(x, torch.tensor(amax / 448)) - x).double().square().sum().item()

    tried = [100.0 * 2 ** (-k / 64) for k in range(4 * 64)]
    # the histogram knows values to a 128th
    assert error(found.item()) <= min(map(error, tried)) * 1.02
    calm = Histogram()
    calm.add(torch.linspace(0.5, 1, 100))
    assert 0.9 < calm.mse() <= 1
    assert Histogram().mse() == 0


def test_scales_follow_the_observer_of_inputs():
    model, name = small(), f"{LAYER}.0.mixer.in_proj"
    table: dict[str, StoredFormat] = {name: "fp8", f"{LAYER}.0.mixer.out_proj": "nvfp4"}
    found = {}
    for observer in ("max", "percentile", "mse"):
        observed = calibrate(model, batches(), find_input_observer(observer))
        found[observer] = model_scales(model, table, observed).linears
    inputs = torch.cat([recorded(model, name, b.input_ids).flatten() for b in batches()]).abs()
    scale = {observer: one[name].input_scale.item() * 448 for observer, one in found.items()}
    assert scale["max"] == pytest.approx(inputs.max().item(), rel=1e-6)
    assert scale["percentile"] <= scale["max"]
    assert 0.05 * scale["max"] < scale["mse"] <= scale["max"] * (1 + 1e-6)
    other = f"{LAYER}.0.mixer.out_proj"  # blocks have scales of their own
    assert torch.equal(found["mse"][other].input_scale, found["max"][other].input_scale)
    with pytest.raises(UserError, match="use one of max, percentile, mse"):
        find_input_observer("entropy")
