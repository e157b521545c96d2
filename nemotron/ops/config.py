"""Which implementation of each operation to use, and which may be computed again."""

from typing import Literal, get_args

from nemotron.section import Section

Recomputed = Literal["layernorm", "gated_rms_norm", "causal_conv1d", "moe_act", "token_copies"]
"""What `recompute` names beside kinds of layers: as Megatron-LM does, or as our operations are."""

RECOMPUTED: dict[Recomputed, frozenset[str]] = {
    name: frozenset({name}) for name in get_args(Recomputed)
} | {
    "layernorm": frozenset({"rms_norm", "residual_rms_norm"}),
    "moe_act": frozenset({"squared_relu"}),
}
"""The operations of each: those that take the time of a pass over memory, not of products."""


class OpsConfig(Section):
    """One backend name per operation, or `auto`: the fastest that is fit for device and data."""

    ssd: str = "auto"
    """Selective state-space scan of the Mamba-2 mixer."""
    causal_conv1d: str = "auto"
    """Causal depthwise convolution with SiLU."""
    attention: str = "auto"
    """Causal grouped-query attention."""
    linear: str = "auto"
    """Matrix product of a dense layer with its float32 weight."""
    grouped_linear: str = "auto"
    """Matrix products of the routed experts."""
    grouped_mlp: str = "auto"
    """Routed experts with their activation; `reference`: products and activation one by one."""
    topk_routing: str = "auto"
    """Choice of experts for each token, and their weights."""
    balance_sums: str = "auto"
    """Shares and counts of the balance loss, added up over each row."""
    expert_order: str = "auto"
    """Order of the tokens' copies by expert."""
    token_copies: str = "auto"
    """Copies of tokens for the routed experts, and the sums of their results."""
    token_step: str = "auto"
    """A few tokens through all layers, for generation on a CPU; `reference`: layer by layer."""
    mamba_step: str = "auto"
    """One token through a Mamba-2 layer, for generation on a GPU; `reference`: as elsewhere."""
    router_step: str = "auto"
    """Experts of a few tokens, for generation on a GPU; `reference`: as in training."""
    expert_step: str = "auto"
    """What the experts make of a few tokens, for generation on a GPU; `reference`: as in training.
    """
    wide_linear: str = "auto"
    """Matrix product of the router, in float32 whatever the activations are."""
    linear_cross_entropy: str = "auto"
    """Head and cross entropy in one, without the logits of the whole batch."""
    rms_norm: str = "auto"
    """Root-mean-square normalization."""
    residual_rms_norm: str = "auto"
    """Normalization of a block's input with the residual's gradient; `reference`: one by one."""
    gated_rms_norm: str = "auto"
    """Gate and grouped normalization of the Mamba-2 mixer."""
    squared_relu: str = "auto"
    """Activation of feed-forward layers and experts."""


_NUMBA = (
    *("attention", "balance_sums", "causal_conv1d", "expert_order", "gated_rms_norm"),
    *("grouped_linear", "grouped_mlp", "linear", "linear_cross_entropy", "rms_norm"),
    *("squared_relu", "ssd", "topk_routing"),
)
_INT16 = ("attention", "grouped_linear", "grouped_mlp", "linear")
PRESETS: dict[str, dict[str, str]] = {
    "auto": dict.fromkeys(OpsConfig.model_fields, "auto"),
    "numba": dict.fromkeys(_NUMBA, "numba"),
    "numba_int16": dict.fromkeys(_NUMBA, "numba") | dict.fromkeys(_INT16, "numba_int16"),
}
"""What `ops: NAME` stands for: every operation of training that has such kernels uses them."""
