"""Copies of weights in the dtype of products: of the present value, or not used."""

import torch
from torch import Tensor, nn

from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.moe import multiplied_weights
from nemotron.ops.linear import float32_gradient
from nemotron.ops.rounded import copy_of, fresh_copy, keep_rounded, renew, round_weight, rounded
from nemotron.train.config import OptimizerConfig
from nemotron.train.optimizer import Optimizer

BF16 = torch.bfloat16


def a_weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))


def test_a_copy_is_used_until_the_weight_changes_and_after_it_was_renewed():
    weight = a_weight()
    keep_rounded([weight], BF16)
    copy = copy_of(weight)
    assert copy is not None
    assert rounded(weight, BF16) is copy
    assert copy.equal(weight.detach().to(BF16))
    with torch.no_grad():
        weight.mul_(2)
    assert fresh_copy(weight, BF16) is None
    assert rounded(weight, BF16).equal(weight.to(BF16))
    copy.copy_(weight.detach())
    renew(weight)
    assert rounded(weight, BF16) is copy
    assert rounded(weight, torch.float32) is weight  # a copy in another dtype is none


def test_gradients_are_those_without_a_copy():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(BF16)

    def gradients(weight: nn.Parameter) -> list[Tensor]:
        found = []
        for y in (float32_gradient.linear(x, weight), x @ round_weight(weight, BF16).T):
            weight.grad = None
            y.float().square().sum().backward()
            assert weight.grad is not None
            found += [y.detach(), weight.grad]
        return found

    plain, kept = a_weight(), a_weight()
    keep_rounded([kept], BF16)
    expected = gradients(plain)
    copy = copy_of(kept)
    assert copy is not None
    found = gradients(kept)
    assert all(map(torch.equal, found, expected))
    assert [t.dtype for t in found] == [BF16, torch.float32] * 2
    copy.zero_()  # they really come from it
    assert not float32_gradient.linear(x, kept).any()
    assert not copy.requires_grad


def small_model() -> HybridLM:
    values = {
        "vocab_size": 64, "hidden_size": 32, "hybrid_override_pattern": "M*E-",
        "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 32, "intermediate_size": 32,
        "moe_latent_size": 16,
    }  # fmt: skip
    model = HybridLM(ModelConfig.model_validate(values))
    model.init_weights(0)
    return model


def test_every_weight_that_is_multiplied_in_bfloat16_is_listed_and_no_other():
    model = small_model()
    ours = {id(weight) for weight in multiplied_weights(model)}
    names = {name for name, p in model.named_parameters() if id(p) in ours}
    assert names == {
        name for name, p in model.named_parameters() if "proj" in name or name == "lm_head.weight"
    }


def test_every_kind_of_step_leaves_copies_of_the_present_values():
    for name in ("adamw", "muon"):
        model = small_model()
        before = {id(w): w.detach().clone() for w in multiplied_weights(model)}
        optimizer = Optimizer(dict(model.named_parameters()), OptimizerConfig(name=name))
        optimizer.keep_rounded(multiplied_weights(model), BF16)
        frozen = model.lm_head.weight  # gets no gradient
        for parameter in model.parameters():
            if parameter is not frozen:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-2)
        for weight in multiplied_weights(model):
            copy = fresh_copy(weight, BF16)
            assert copy is not None
            assert copy.equal(weight.detach().to(BF16))
            assert (weight is frozen) == weight.equal(before[id(weight)])
