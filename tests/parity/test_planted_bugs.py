"""Each port bug that was seen in the wild, planted once: the parity test must go red.

Sources: huggingface/transformers#48989 and #45591, vllm-project/vllm#45037,
PrimeIntellect-ai/prime-rl#2338, state-spaces/mamba#910, ggml-org/llama.cpp#15507.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from test_transformers import LOGITS
from torch import Tensor, nn

from nemotron.model.attention import Attention
from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import MLP
from nemotron.model.mamba2 import Mamba2
from nemotron.model.moe import Experts, MoE
from nemotron.model.router import FirstRun, GroupChoice, Router, Routing
from nemotron.ops.attention import attention
from nemotron.ops.causal_conv1d import causal_conv1d
from nemotron.ops.rms_norm import gated_rms_norm
from nemotron.ops.squared_relu import squared_relu
from nemotron.ops.ssd import ssd

Kind = TypeVar("Kind")
Patch = pytest.MonkeyPatch
Mutation = Callable[[HybridLM, Patch], None]


def every(model: HybridLM, kind: type[Kind]) -> Iterator[Kind]:
    return (module for module in model.modules() if isinstance(module, kind))


def floor_of_the_time_step(model: HybridLM, _: Patch) -> None:
    for mixer in every(model, Mamba2):
        mixer.time_step_limit = (0.001, float("inf"))


def replace(model: HybridLM, kind: type[nn.Module], operation: str, wrong: Callable) -> None:
    """Give every module of a kind another operation."""
    for module in every(model, kind):
        assert hasattr(module, operation)
        setattr(module, operation, wrong)


def norm_over_one_group(model: HybridLM, _: Patch) -> None:
    replace(
        model,
        Mamba2,
        "gated_rms_norm",
        lambda y, z, w, groups, eps: gated_rms_norm(y, z, w, 1, eps),
    )


def norm_before_the_gate(model: HybridLM, _: Patch) -> None:
    def wrong(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        parts = y.unflatten(-1, (groups, -1))
        normed = F.rms_norm(parts, parts.shape[-1:], None, eps).flatten(-2)
        return normed * weight * F.silu(z)

    replace(model, Mamba2, "gated_rms_norm", wrong)


def no_gate(model: HybridLM, _: Patch) -> None:
    replace(
        model,
        Mamba2,
        "gated_rms_norm",
        lambda y, z, *rest: gated_rms_norm(y, torch.full_like(z, 3.0), *rest),
    )


def scaling_twice(model: HybridLM, _: Patch) -> None:
    for router in every(model, Router):
        router.scaling **= 2


def no_scaling(model: HybridLM, _: Patch) -> None:
    for router in every(model, Router):
        router.scaling = 1.0


def bias_dropped_from_the_choice(model: HybridLM, _: Patch) -> None:
    for router in every(model, Router):
        router.e_score_correction_bias.zero_()


def bias_stored_in_bfloat16(model: HybridLM, _: Patch) -> None:
    for router in every(model, Router):
        bias = router.e_score_correction_bias
        bias.copy_(bias.bfloat16())


def biased_scores_as_weights(_: HybridLM, patch: Patch) -> None:
    right = Router.forward

    def wrong(self: Router, x: Tensor, *rest: GroupChoice | FirstRun | None) -> Routing:
        routing = right(self, x, *rest)
        weights = (routing.scores + self.e_score_correction_bias).gather(1, routing.experts)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return dataclasses.replace(routing, weights=weights * self.scaling)

    patch.setattr(Router, "forward", wrong)


def softmax_instead_of_sigmoid(_: HybridLM, patch: Patch) -> None:
    right = Router.forward

    def wrong(self: Router, x: Tensor, *rest: GroupChoice | FirstRun | None) -> Routing:
        with Patch.context() as inside:
            inside.setattr(Tensor, "sigmoid", lambda scores: scores.softmax(-1))
            return right(self, x, *rest)

    patch.setattr(Router, "forward", wrong)


def normalization_flipped(model: HybridLM, _: Patch) -> None:
    for router in every(model, Router):
        router.normalize = not router.normalize


def no_shared_expert(model: HybridLM, _: Patch) -> None:
    for layer in every(model, MoE):
        layer.shared_experts.down_proj.weight.data.zero_()


def relu_not_squared(model: HybridLM, _: Patch) -> None:
    def wrong(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return x.relu() if weight is None else x.relu() * weight

    replace(model, MLP, "squared_relu", wrong)
    replace(model, Experts, "squared_relu", wrong)


def weights_inside_the_square(model: HybridLM, _: Patch) -> None:
    replace(model, Experts, "squared_relu", lambda x, weight: squared_relu(x * weight))


def no_skip_connection(model: HybridLM, _: Patch) -> None:
    for mixer in every(model, Mamba2):
        mixer.D.data.zero_()


def time_step_without_bias(model: HybridLM, _: Patch) -> None:
    for mixer in every(model, Mamba2):
        mixer.dt_bias.data.zero_()


def decay_not_exponentiated(model: HybridLM, _: Patch) -> None:
    for mixer in every(model, Mamba2):
        mixer.A_log.data.exp_()


def convolution_without_activation(model: HybridLM, _: Patch) -> None:
    replace(
        model,
        Mamba2,
        "causal_conv1d",
        lambda *args, **rest: causal_conv1d(*args, **rest, activation=False),
    )


def convolution_without_bias(model: HybridLM, _: Patch) -> None:
    for mixer in every(model, Mamba2):
        mixer.conv1d.bias.data.zero_()


def kernel_reversed(model: HybridLM, _: Patch) -> None:
    for mixer in every(model, Mamba2):
        mixer.conv1d.weight.data.copy_(mixer.conv1d.weight.data.flip(-1))


def state_inputs_swapped(model: HybridLM, _: Patch) -> None:
    replace(model, Mamba2, "ssd", lambda x, dt, A, B, C, D, **rest: ssd(x, dt, A, C, B, D, **rest))


def key_heads_interleaved(model: HybridLM, _: Patch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, **rest: object) -> Tensor:
        repeats = q.shape[2] // k.shape[2]
        return attention(q, k.repeat(1, 1, repeats, 1), v.repeat(1, 1, repeats, 1), **rest)

    replace(model, Attention, "attention", wrong)


def attention_sees_the_future(model: HybridLM, _: Patch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads, enable_gqa=True).transpose(1, 2)

    replace(model, Attention, "attention", wrong)


def drawn_again_after_loading(model: HybridLM, _: Patch) -> None:
    fresh = HybridLM(model.config)
    fresh.init_weights(7)
    for ours, other in zip(every(model, Mamba2), every(fresh, Mamba2), strict=True):
        ours.dt_bias.data.copy_(other.dt_bias.data)
        ours.out_proj.weight.data.copy_(other.out_proj.weight.data)


def default_epsilon(model: HybridLM, _: Patch) -> None:
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-5


# "every block" has an epsilon of its own and no normalization; the others have groups of experts
MUTATIONS: dict[Mutation, str] = {
    floor_of_the_time_step: "nano",
    norm_over_one_group: "nano",
    norm_before_the_gate: "nano",
    no_gate: "nano",
    scaling_twice: "super",
    no_scaling: "nano",
    bias_dropped_from_the_choice: "super",
    bias_stored_in_bfloat16: "nano",
    biased_scores_as_weights: "super",
    softmax_instead_of_sigmoid: "nano",
    normalization_flipped: "nano",
    no_shared_expert: "super",
    relu_not_squared: "every block",
    weights_inside_the_square: "nano",
    no_skip_connection: "nano",
    time_step_without_bias: "nano",
    decay_not_exponentiated: "nano",
    convolution_without_activation: "nano",
    convolution_without_bias: "nano",
    kernel_reversed: "nano",
    state_inputs_swapped: "nano",
    key_heads_interleaved: "nano",
    attention_sees_the_future: "nano",
    drawn_again_after_loading: "nano",
    default_epsilon: "every block",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_planted_bug_turns_parity_red(pair_of, tokens, monkeypatch: Patch, mutation: Mutation):
    pair, ids = pair_of(MUTATIONS[mutation]), tokens(2, 63)
    if mutation is bias_stored_in_bfloat16:
        # as large as in a long run, where what matters is a small difference of large numbers
        for ours, theirs in zip(
            every(pair.ours, Router),
            (b for n, b in pair.theirs.named_buffers() if n.endswith("correction_bias")),
            strict=True,
        ):
            ours.e_score_correction_bias.add_(64)
            theirs.copy_(ours.e_score_correction_bias)
    assert pair.difference(ids) <= LOGITS
    mutation(pair.ours, monkeypatch)
    assert pair.difference(ids) > LOGITS
