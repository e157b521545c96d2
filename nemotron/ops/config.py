"""Which implementation of each operation to use."""

from nemotron.section import Section


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
    gated_rms_norm: str = "auto"
    """Gate and grouped normalization of the Mamba-2 mixer."""
    squared_relu: str = "auto"
    """Activation of feed-forward layers and experts."""
