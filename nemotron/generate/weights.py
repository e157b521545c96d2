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
from nemotron.model.mlp import MLP
from nemotron.model.moe import Experts, MoE
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
            if isinstance(child, MoE):
                child.experts.to(dtype)
                child.shared_experts.to(dtype)
                size = sum(p.numel() for p in child.experts.parameters()) * dtype.itemsize
                if pack and size <= DENSE_BYTES:
                    setattr(module, name, DenseMoE(child))
            elif isinstance(child, Linear):
                child.to(dtype)
                if pack:
                    setattr(module, name, PackedLinear(child.weight))
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
    """Small experts: a few tokens pass all of them at once, with weight 0 where not chosen.

    `shared` is the expert that every token passes, when it reads the same input.
    """

    def __init__(self, experts: Experts, shared: MLP | None = None) -> None:
        super().__init__()
        self.num_experts, width, input_size = experts.up_proj.shape
        self.routed_size = self.num_experts * width
        # all experts side by side: [E F, I], and [I, E F], whose product also adds them up
        up = [experts.up_proj.flatten(0, 1)]
        down = [experts.down_proj.transpose(0, 1).reshape(input_size, -1)]
        if shared is not None:
            up.append(shared.up_proj.weight)
            down.append(shared.down_proj.weight)
        self.up = PackedLinear(torch.cat(up))
        self.down = PackedLinear(torch.cat(down, dim=1))

    def forward(self, x: Float[Tensor, "M I"], routing: Routing) -> Float[Tensor, "M I"]:
        weights = routing.weights.new_zeros(x.shape[0], self.num_experts, 1)
        weights.squeeze(2).scatter_(1, routing.experts, routing.weights)
        hidden = self.up(x, "relu").float().square_()  # [M, E F and the shared expert's]
        hidden[:, : self.routed_size].view(x.shape[0], self.num_experts, -1).mul_(weights)
        return self.down(hidden.to(x.dtype))


class DenseMoE(nn.Module):
    """A mixture of small experts; with more than a few tokens it is computed as in training."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        shared = moe.shared_experts if moe.fc1_latent_proj is None else None
        self.experts = DenseExperts(moe.experts, shared)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        tokens, moe = x.flatten(0, 1), self.moe  # [M, D]
        if tokens.shape[0] > DENSE_TOKENS:
            return moe(x)[0]
        routing = moe.gate(tokens)
        if moe.fc1_latent_proj is None or moe.fc2_latent_proj is None:
            return self.experts(tokens, routing).view_as(x)
        latent = self.experts(moe.fc1_latent_proj(tokens), routing)
        return moe.fc2_latent_proj(latent).view_as(x) + moe.shared_experts(x)
