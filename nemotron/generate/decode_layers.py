"""Layers and weights in the form that decodes fastest; a model so prepared only generates.

On a CPU a token's time is the time to read the weights and to start the operations. oneDNN reads
its own blocked layout two to four times as fast as a row-major matrix (torch.compile's frozen
graphs use the same calls), of the experts only the chosen ones are read, and layers for one token
start fewer operations.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron.model.attention import Attention
from nemotron.model.cache import AttentionState, MambaState
from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import Linear
from nemotron.model.mamba2 import Mamba2
from nemotron.model.mlp import MLP
from nemotron.model.moe import Experts, MoE
from nemotron.model.router import Routing

FEW_TOKENS = 8
"""Up to so many tokens pass their experts one by one; the experts read twice cost little yet."""


@torch.no_grad()
def prepare_weights(model: HybridLM) -> HybridLM:
    """Cast the matrices to the compute dtype and lay them out anew, in place; return the model."""
    dtype = model.compute_dtype or model.backbone.embeddings.weight.dtype
    _replace(model, dtype)
    return model.requires_grad_(False)


def _replace(parent: nn.Module, dtype: torch.dtype) -> None:
    """Put what decodes faster in the place of every module below `parent`."""
    for name, child in list(parent.named_children()):
        if isinstance(child, Linear):
            child.to(dtype)
            if _can_pack(child.weight):
                setattr(parent, name, PackedLinear(child.weight))
            continue
        if isinstance(child, MoE):
            child.experts.to(dtype)
            child.shared_experts.to(dtype)
            if child.experts.up_proj.device.type == "cpu":
                setattr(parent, name, FewTokensMoE(child))
        elif isinstance(child, Mamba2):
            child = MambaStep(child)
            setattr(parent, name, child)
        elif isinstance(child, Attention):
            child = JointAttention(child)
            setattr(parent, name, child)
        _replace(child, dtype)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


class PackedLinear(nn.Module):
    """Matrix product without bias, its weight in oneDNN's blocked layout."""

    def __init__(self, weight: Float[Tensor, "O I"]) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), FEW_TOKENS)

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class ChosenExperts(nn.Module):
    """Experts as tables whose rows are summed: reads those of a token's experts and no others.

    A product W x is the sum of the columns of W, each times an element of x: an embedding bag.
    `shared` is the expert that every token passes, as wide as one or several routed ones, when it
    reads the same input.
    """

    def __init__(self, experts: Experts, shared: MLP | None) -> None:
        super().__init__()
        width = experts.up_proj.shape[1]
        up, down = experts.up_proj.mT, experts.down_proj.mT  # [E, I, F], [E, F, I]
        num_experts = num_all = up.shape[0]
        if shared is not None:
            up = torch.cat([up, shared.up_proj.weight.unflatten(0, (-1, width)).mT])
            down = torch.cat([down, shared.down_proj.weight.T.unflatten(0, (-1, width))])
            num_all = up.shape[0]
        self.up, self.down = up.flatten(0, 1).contiguous(), down.flatten(0, 1).contiguous()
        self.up_rows = torch.arange(self.up.shape[0]).view(num_all, -1)
        self.down_rows = torch.arange(self.down.shape[0]).view(num_all, -1)
        self.always = torch.arange(num_experts, num_all)
        # the same memory serves when many tokens come
        for parameter, table in ((experts.up_proj, self.up), (experts.down_proj, self.down)):
            parameter.data = table.view(num_all, -1, table.shape[1])[:num_experts].mT

    def forward(self, x: Float[Tensor, "M I"], routing: Routing) -> Float[Tensor, "M I"]:
        experts: Int[Tensor, "M K"] = routing.experts
        weights = routing.weights
        if extra := self.always.shape[0]:
            experts = torch.cat([experts, self.always.expand(x.shape[0], -1)], dim=1)
            weights = F.pad(weights, (0, extra), value=1.0)
        chosen = experts.flatten()
        rows = x.repeat_interleave(experts.shape[1], dim=0)  # [M K, I]
        hidden = _sum_rows(self.up, self.up_rows.index_select(0, chosen), rows)  # [M K, F]
        hidden = (hidden.relu_() * weights.view(-1, 1)).mul_(hidden).to(x.dtype)
        rows = _sum_rows(self.down, self.down_rows.index_select(0, chosen), hidden)
        return rows.view(*experts.shape, -1).sum(1)


def _sum_rows(
    table: Float[Tensor, "R O"], rows: Int[Tensor, "bags I"], weights: Float[Tensor, "bags I"]
) -> Float[Tensor, "bags O"]:
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


class FewTokensMoE(nn.Module):
    """A mixture that treats a few tokens by themselves; with more it is computed as in training."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        # the shared expert goes along with the others where it can
        width = moe.experts.up_proj.shape[1]
        shared_width = moe.shared_experts.up_proj.weight.shape[0]
        self.includes_shared = moe.fc1_latent_proj is None and shared_width % width == 0
        self.experts = ChosenExperts(
            moe.experts, moe.shared_experts if self.includes_shared else None
        )

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        tokens, moe = x.flatten(0, 1), self.moe  # [M, D]
        if tokens.shape[0] > FEW_TOKENS:
            return moe(x)[0]
        routing = moe.gate(tokens)
        latent = tokens if moe.fc1_latent_proj is None else moe.fc1_latent_proj(tokens)
        routed = self.experts(latent, routing)
        if moe.fc2_latent_proj is not None:
            routed = moe.fc2_latent_proj(routed)
        routed = routed.view_as(x)
        return routed if self.includes_shared else routed + moe.shared_experts(x)


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Give a module what another one holds: parameters, children, settings, operations."""
    for name, value in vars(old).items():
        vars(new)[name] = value.copy() if isinstance(value, dict) else value


class MambaStep(Mamba2):
    """Mixes one token of each row by the recurrence itself, several as in training."""

    def __init__(self, mamba: Mamba2) -> None:
        _take_over(self, mamba)
        self.kernel = self.conv1d.weight.squeeze(1).T.contiguous()  # [W, C]
        self.decay = -self.A_log.exp().view(-1, 1, 1)
        self.skip, self.gain = self.D.view(-1, 1, 1), self.norm.weight

    def forward(
        self,
        u: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Mamba2.forward`; `state` changes in place."""
        if state is None or seq_idx is not None or u.shape[1] != 1:
            return super().forward(u, seq_idx, state)
        z, xBC, dt = self.in_proj(u).split(self.splits, dim=-1)
        window = torch.cat([state.conv, xBC], dim=1)  # [B, W, C]
        state.conv = window[:, 1:]
        mixed = (window * self.kernel).sum(1)
        if self.conv1d.bias is not None:
            mixed += self.conv1d.bias
        inner, bc = self.splits[0], self.num_groups * self.state_size
        x, B, C = F.silu(mixed, inplace=True).split([inner, bc, bc], dim=-1)
        x = x.view(*state.ssm.shape[:3], 1)  # [B, H, P, 1]
        dt = self._time_step(dt).view(*state.ssm.shape[:2], 1, 1)

        # S <- exp(dt A) S + dt x ⊗ B, then y = S C + D x
        state.ssm.mul_((dt * self.decay).exp_())
        # every group by itself, the channels of its heads side by side: [B G, H P / G, N]
        states = state.ssm.view(-1, inner // self.num_groups, self.state_size)
        B, C = (t.reshape(-1, 1, self.state_size) for t in (B, C))
        states.addcmul_((dt * x).view(states.shape[0], -1, 1), B)
        y = torch.bmm(C, states.mT).view_as(x).addcmul_(x, self.skip)
        y = y.view_as(z).to(u.dtype)
        y = self.gated_rms_norm(y, z, self.gain, self.num_groups, self.norm.eps)
        return self.out_proj(y)


class JointAttention(Attention):
    """Computes queries, keys and values in one product."""

    def __init__(self, attention: Attention) -> None:
        _take_over(self, attention)
        parts: list[Tensor] = [part.weight for part in (self.q_proj, self.k_proj, self.v_proj)]
        self.sizes = [part.shape[0] for part in parts]
        with torch.device("meta"):
            self.qkv_proj = Linear(parts[0].shape[1], sum(self.sizes))
        self.qkv_proj.linear = self.q_proj.linear
        self.qkv_proj.weight = nn.Parameter(torch.cat(parts))
        del self.q_proj, self.k_proj, self.v_proj

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: AttentionState | None = None,
        start: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Attention.forward`."""
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        return self.o_proj(self.attend(q, k, v, seq_idx, state, start))
