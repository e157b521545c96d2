"""Weights in the form in which decoding reads them fastest; a model so prepared only generates.

On a CPU a token's time is the time to read the weights, and oneDNN reads its own blocked layout
two to four times as fast as a row-major matrix; torch.compile's frozen graphs use the same calls.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import Linear
from nemotron.model.mamba2 import CausalConv
from nemotron.model.moe import Experts
from nemotron.model.router import Routing

DENSE_BYTES = 16 * 2**20
"""Experts of a layer that are no larger than this are all computed for every token when few come:
one product over all of them takes less time than starting one for each."""
DENSE_TOKENS = 16
"""Most tokens for which that holds."""


@torch.no_grad()
def prepare_weights(model: HybridLM) -> HybridLM:
    """Cast the matrices to the compute dtype and pack them, in place; return the model."""
    dtype = model.compute_dtype or model.backbone.embeddings.weight.dtype
    pack = _can_pack(model.backbone.embeddings.weight.device, dtype)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                child.to(dtype)
                if pack:
                    setattr(module, name, PackedLinear(child.weight))
            elif isinstance(child, Experts):
                child.to(dtype)
                size = sum(p.numel() for p in child.parameters()) * dtype.itemsize
                if pack and size <= DENSE_BYTES:
                    setattr(module, name, DenseExperts(child))
            elif isinstance(child, CausalConv):
                # tap after tap, as one token's step reads them
                taps = child.weight.permute(2, 1, 0).contiguous()
                child.weight = nn.Parameter(taps.permute(2, 1, 0))
    return model.requires_grad_(False)


def _can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class PackedLinear(nn.Module):
    """Matrix product without bias, its weight in oneDNN's blocked layout."""

    def __init__(self, weight: Float[Tensor, "O I"]) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), DENSE_TOKENS)

    def forward(
        self, x: Float[Tensor, "*batch I"], activation: str = "none"
    ) -> Float[Tensor, "*batch O"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, activation, [], "")


class DenseExperts(nn.Module):
    """Small experts: a few tokens pass all of them at once, with weight 0 where not chosen."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts
        self.num_experts, _, input_size = experts.up_proj.shape
        # all experts side by side: [E F, I], and [I, E F], whose product also adds them up
        self.up = PackedLinear(experts.up_proj.flatten(0, 1))
        self.down = PackedLinear(
            experts.down_proj.transpose(0, 1).reshape(input_size, -1).contiguous()
        )

    def forward(self, x: Float[Tensor, "M I"], routing: Routing) -> Float[Tensor, "M I"]:
        if x.shape[0] > DENSE_TOKENS:
            return self.experts(x, routing)
        weights = routing.weights.new_zeros(x.shape[0], self.num_experts)
        weights.scatter_(1, routing.experts, routing.weights)
        hidden = self.up(x, "relu").unflatten(1, (self.num_experts, -1))  # [M, E, F]
        hidden = hidden.float().square_().mul_(weights.unsqueeze(2)).to(x.dtype)
        return self.down(hidden.flatten(1))
