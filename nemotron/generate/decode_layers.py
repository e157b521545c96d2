"""A model in the form that decodes fastest, beside the trained one or in its place.

On a CPU a token's time is the time to read the weights and to start the operations. oneDNN reads
its own blocked layout two to four times as fast as a row-major matrix (torch.compile's frozen
graphs use the same calls), of the experts only the chosen ones are read, and layers for one token
start fewer operations.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nemotron.generate.block_layers import BlockLinear, BlockMoE
from nemotron.generate.token_steps import TokenSteps, operation_of
from nemotron.model.attention import Attention
from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import MLP, Linear
from nemotron.model.mamba2 import Mamba2
from nemotron.model.moe import Experts, MoE
from nemotron.model.router import Choice, FirstRun, Router, Routing, RoutingStats
from nemotron.model.state import AttentionState, MambaState
from nemotron.ops.mamba_step import Weights
from nemotron.ops.token_step import TokenStepOp
from nemotron.precision.static import is_attached

FEW_TOKENS = 8
"""Up to so many tokens pass their experts one by one; the experts read twice cost little yet."""


@torch.no_grad()
def decode_view(model: HybridLM, *, pack: bool = False) -> HybridLM:
    """Return a model for decoding that has its parameters in common with `model`.

    `model` stays as it is and can be trained on; the view then computes with its newest weights.
    With `pack` the view has weights of its own, those of now, prepared as by `prepare_weights`: it
    decodes faster, takes memory and must be made again after an update.
    """
    view = cast(HybridLM, copy_modules(model))
    if pack:
        prepare_weights(view)
        _separate(view, model)
        return view
    for module in list(view.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Mamba2):
                setattr(module, name, MambaStep(child))
    return view


def copy_modules(module: nn.Module) -> nn.Module:
    """Return other modules with the same parameters, buffers, settings and operations."""
    new = module.__class__.__new__(module.__class__)
    take_over(new, module)
    for name, child in module.named_children():
        setattr(new, name, copy_modules(child))
    return new


def _separate(view: nn.Module, model: nn.Module) -> None:
    """Give the view copies of what it still has in common with the model."""
    common = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for module in view.modules():
        if is_attached(module):
            continue  # its call computes with the model's own
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in common:
                setattr(module, name, _frozen(parameter.clone()))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if id(buffer) in common:
                setattr(module, name, buffer.clone())


@torch.no_grad()
def prepare_weights(model: HybridLM) -> HybridLM:
    """Cast the matrices to the compute dtype and lay them out anew; return the model.

    The old ones are released one by one, so that there are never two models in memory. The model
    can only generate afterwards.
    """
    dtype = model.compute_dtype or model.backbone.embeddings.weight.dtype
    lay_out(model, dtype, operation_of(model, dtype))
    return model


@torch.no_grad()
def lay_out(model: HybridLM, dtype: torch.dtype, operation: TokenStepOp | None) -> None:
    """Replace the layers by those that decode; with an operation for steps, by those it reads."""
    _replace(model, dtype, operation)
    if operation is not None:
        model.steps = TokenSteps()


def _replace(parent: nn.Module, dtype: torch.dtype, blocks: TokenStepOp | None) -> None:
    """Put what decodes faster in the place of every module below `parent`.

    No parameter changes: another model may have it, too. Layers with fixed scales stay. `blocks` is
    the operation that reads weights in blocks, if there is one.
    """
    for name, child in list(parent.named_children()):
        if is_attached(child):
            continue  # computes by fixed scales, with its own float32 weights
        if isinstance(child, Linear):
            _cast(child, dtype)
            if blocks is not None:
                setattr(parent, name, BlockLinear(child.weight, blocks))
            elif _can_pack(child.weight):
                setattr(parent, name, PackedLinear(child.weight))
            continue
        if isinstance(child, MoE) and not any(map(is_attached, child.modules())):
            _cast(child.experts, dtype)
            if child.experts.expert_step.takes(child.experts.up_proj, (1,)):
                child = MoEStep(child)
                setattr(parent, name, child)
            elif child.experts.up_proj.device.type == "cpu":
                for part in (child.shared_experts.up_proj, child.shared_experts.down_proj):
                    _cast(part, dtype)
                is_few = FewTokensMoE(child) if blocks is None else BlockMoE(child, blocks)
                setattr(parent, name, is_few)
        elif isinstance(child, Router) and child.router_step.takes(child.weight, (1,)):
            child = RouterStep(child)
            setattr(parent, name, child)
        elif isinstance(child, Mamba2):
            child = MambaStep(child, copies=True)
            setattr(parent, name, child)
        elif isinstance(child, Attention) and not any(map(is_attached, child.children())):
            child = JointAttention(child)
            setattr(parent, name, child)
        _replace(child, dtype, blocks)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, _frozen(parameter.to(dtype)))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


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
        most = torch.arange(FEW_TOKENS * num_all)
        self.up_bags, self.down_bags = (
            most * part.shape[1] for part in (self.up_rows, self.down_rows)
        )
        # the same memory serves when many tokens come
        for name, table in (("up_proj", self.up), ("down_proj", self.down)):
            parts = table.view(num_all, -1, table.shape[1])[:num_experts].mT
            setattr(experts, name, _frozen(parts))

    def forward(self, x: Float[Tensor, "M I"], routing: Routing) -> Float[Tensor, "M I"]:
        experts: Int[Tensor, "M K"] = routing.experts
        weights = routing.weights
        if extra := self.always.shape[0]:
            experts = torch.cat([experts, self.always.expand(x.shape[0], -1)], dim=1)
            weights = F.pad(weights, (0, extra), value=1.0)
        chosen = experts.flatten()
        rows = x.repeat_interleave(experts.shape[1], dim=0)  # [M K, I]
        chosen_up = self.up_rows.index_select(0, chosen)
        hidden = _sum_rows(self.up, chosen_up, rows, self.up_bags)  # [M K, F]
        hidden = (hidden.relu_() * weights.view(-1, 1)).mul_(hidden).to(x.dtype)
        chosen_down = self.down_rows.index_select(0, chosen)
        rows = _sum_rows(self.down, chosen_down, hidden, self.down_bags)
        return rows.view(*experts.shape, -1).sum(1)


def _sum_rows(
    table: Float[Tensor, "R O"],
    rows: Int[Tensor, "bags I"],
    weights: Float[Tensor, "bags I"],
    bags: Int[Tensor, " most"],
) -> Float[Tensor, "bags O"]:
    """Sum the rows of each bag, times their weights; `bags` are the bags' beginnings, and more."""
    # as F.embedding_bag, which finds the beginnings anew each time
    begins = bags[: rows.shape[0]]
    return torch.embedding_bag(
        table, rows.flatten(), begins, False, 0, False, weights.flatten(), False
    )[0]


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

    def forward(
        self, x: Float[Tensor, "B T D"], choice: Choice | None = None
    ) -> Float[Tensor, "B T D"]:
        tokens, moe = x.flatten(0, 1), self.moe  # [M, D]
        if tokens.shape[0] > FEW_TOKENS:
            return moe(x, choice=choice)[0]
        routing = moe.gate(tokens, choice)
        latent = tokens if moe.fc1_latent_proj is None else moe.fc1_latent_proj(tokens)
        routed = self.experts(latent, routing)
        if moe.fc2_latent_proj is not None:
            routed = moe.fc2_latent_proj(routed)
        routed = routed.view_as(x)
        return routed if self.includes_shared else routed + moe.shared_experts(x)


class RouterStep(Router):
    """Routes few tokens by an operation of its own, others as in training."""

    def __init__(self, router: Router) -> None:
        take_over(self, router)

    def forward(
        self,
        x: Float[Tensor, "M D"],
        choice: Choice | None = None,
        first_run: FirstRun | None = None,
    ) -> Routing:
        """As `Router.forward`; of equal scores another expert may be chosen."""
        is_plain = choice is None and self.num_groups == 1 and not torch.is_grad_enabled()
        if not is_plain or not self.router_step.takes(x, (x.shape[0],)):
            return super().forward(x, choice, first_run)
        bias, top_k = self.e_score_correction_bias, self.top_k
        found = self.router_step(
            x, self.weight, bias, top_k, self.scaling, normalize=self.normalize
        )
        return Routing(*found)


class MoEStep(MoE):
    """Reads the chosen experts alone where tokens are few; others are computed as in training."""

    def __init__(self, moe: MoE) -> None:
        take_over(self, moe)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        stats_name: str | None = None,
        padding: Bool[Tensor, "B S"] | None = None,
        choice: Choice | None = None,
        first_run: FirstRun | None = None,
    ) -> tuple[Float[Tensor, "B T D"], RoutingStats | None]:
        """As `MoE.forward`."""
        tokens, experts = x.flatten(0, 1), self.experts
        copies = tokens.shape[0] * self.gate.top_k
        if (
            stats_name is not None
            or torch.is_grad_enabled()
            or not _is_plain(experts, x.dtype)
            or not experts.expert_step.takes(tokens, (copies,))
        ):
            return super().forward(x, stats_name, padding, choice, first_run)
        routing = self.gate(tokens, choice)
        given = routing.experts, routing.weights, experts.up_proj, experts.down_proj
        shared = self.shared_experts(tokens)
        if self.fc1_latent_proj is None or self.fc2_latent_proj is None:
            return experts.expert_step(tokens, *given, shared).view_as(x), None
        latent = experts.expert_step(self.fc1_latent_proj(tokens), *given)
        return (self.fc2_latent_proj(latent) + shared).view_as(x), None


def _is_plain(experts: Experts, dtype: torch.dtype) -> bool:
    """Whether the experts are all here, prepared for a dtype, and nothing is added to them."""
    others = experts.dispatcher, experts.number_copies, experts.up_adapter, experts.down_adapter
    return experts.up_proj.dtype == dtype and all(other is None for other in others)


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Give a module what another one holds: parameters, children, settings, operations."""
    for name, value in vars(old).items():
        vars(new)[name] = value.copy() if isinstance(value, dict) else value


class MambaStep(Mamba2):
    """Mixes tokens of a cached row one by one by the recurrence itself, others as in training.

    With `copies` the layer computes with its parameters of now, else with those of each call.
    """

    def __init__(self, mamba: Mamba2, *, copies: bool = False) -> None:
        take_over(self, mamba)
        self._constants = self._find_constants() if copies else None

    def forward(
        self,
        u: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Mamba2.forward`; the states change in place."""
        is_stepwise = state is not None and (u.shape[1] == 1 or state.history is not None)
        if state is None or state.keeps_inputs or not is_stepwise:
            return super().forward(u, seq_idx, state)
        z, xBC, dt = self.in_proj(u).split(self.splits, dim=-1)
        if u.shape[1] == 1 and (y := self._fused_step(xBC, dt, state)) is not None:
            y = self.gated_rms_norm(y, z, self.norm.weight, self.num_groups, self.norm.eps)
            return self.out_proj(y)
        dt = self._time_step(dt)
        constants = self._constants or self._find_constants()
        if u.shape[1] == 1:
            y = self._step(xBC, dt, state, constants)
        else:
            each = zip(xBC.split(1, dim=1), dt.split(1, dim=1), strict=True)
            y = torch.cat([self._step(*one, state, constants) for one in each], dim=1)
        y = self.gated_rms_norm(y.to(u.dtype), z, self.norm.weight, self.num_groups, self.norm.eps)
        return self.out_proj(y)

    def _fused_step(
        self, xBC: Float[Tensor, "B 1 C"], dt: Float[Tensor, "B 1 H"], state: MambaState
    ) -> Float[Tensor, "B 1 I"] | None:
        """Do what lies between the projection and the norm in one operation, where there is one."""
        if (places := state.in_place()) is None or not self.mamba_step.takes(xBC):
            return None
        weights = Weights(
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.time_step_limit,
        )
        return self.mamba_step(xBC.squeeze(1), dt.squeeze(1), *places, weights).unsqueeze(1)

    def _find_constants(self) -> "_Constants":
        kernel, decay = self.conv1d.weight.squeeze(1).T, -self.A_log.exp()
        skip = self.D.view(-1, 1, 1).clone()
        return _Constants(kernel.contiguous(), decay.view(-1, 1, 1), skip)

    def _step(
        self,
        xBC: Float[Tensor, "B 1 C"],
        dt: Float[Tensor, "B 1 H"],
        state: MambaState,
        constants: "_Constants",
    ) -> Float[Tensor, "B 1 I"]:
        """Convolve and scan one token of each row."""
        window = torch.cat([state.conv, xBC], dim=1)  # [B, W, C]
        mixed = (window * constants.kernel).sum(1)
        if self.conv1d.bias is not None:
            mixed += self.conv1d.bias
        inner, bc = self.splits[0], self.num_groups * self.state_size
        x, B, C = F.silu(mixed, inplace=True).split([inner, bc, bc], dim=-1)
        ssm = state.ssm
        x = x.view(*ssm.shape[:3], 1)  # [B, H, P, 1]
        dt = dt.view(*ssm.shape[:2], 1, 1)

        # S <- exp(dt A) S + dt x ⊗ B, then y = S C + D x
        ssm.mul_((dt * constants.decay).exp_())
        # every group by itself, the channels of its heads side by side: [B G, H P / G, N]
        states = ssm.view(-1, inner // self.num_groups, self.state_size)
        B, C = (t.reshape(-1, 1, self.state_size) for t in (B, C))
        states.addcmul_((dt * x).view(states.shape[0], -1, 1), B)
        y = torch.bmm(C, states.mT).view_as(x).addcmul_(x, constants.skip)
        state.store(window[:, 1:], ssm)
        return y.view(xBC.shape[0], 1, inner)


class _Constants(NamedTuple):
    """What a step of the recurrence needs besides its inputs."""

    kernel: Float[Tensor, "W C"]
    decay: Float[Tensor, "H 1 1"]
    """-exp(A_log)"""
    skip: Float[Tensor, "H 1 1"]


class JointAttention(Attention):
    """Computes queries, keys and values in one product."""

    def __init__(self, attention: Attention) -> None:
        take_over(self, attention)
        parts: list[Tensor] = [part.weight for part in (self.q_proj, self.k_proj, self.v_proj)]
        self.sizes = [part.shape[0] for part in parts]
        with torch.device("meta"):
            self.qkv_proj = Linear(parts[0].shape[1], sum(self.sizes))
        self.qkv_proj.linear = self.q_proj.linear
        self.qkv_proj.weight = _frozen(torch.cat(parts))
        del self.q_proj, self.k_proj, self.v_proj

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: AttentionState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Attention.forward`."""
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        return self.o_proj(self.attend(q, k, v, seq_idx, state))
