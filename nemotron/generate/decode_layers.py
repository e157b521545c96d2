"""A model in the form that decodes fastest, beside the trained one or in its place.

On a CPU a token's time is the time to read the weights and to start the operations. oneDNN reads
its own blocked layout two to four times as fast as a row-major matrix (torch.compile's frozen
graphs use the same calls), of the experts only the chosen ones are read, and layers for one token
start fewer operations.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron.generate.block_layers import BlockLinear, BlockMoE
from nemotron.generate.expert_layers import FEW_TOKENS, FewTokensMoE, MoEStep, RouterStep
from nemotron.generate.mixer_layers import JointAttention, MambaStep
from nemotron.generate.module_copies import copy_modules, frozen
from nemotron.generate.token_steps import TokenSteps, operation_of
from nemotron.model.attention import Attention
from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import Linear
from nemotron.model.mamba2 import Mamba2
from nemotron.model.moe import MoE
from nemotron.model.router import Router
from nemotron.ops.token_step import TokenStepOp
from nemotron.precision.static import is_attached


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


def _separate(view: nn.Module, model: nn.Module) -> None:
    """Give the view copies of what it still has in common with the model."""
    common = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for module in view.modules():
        if is_attached(module):
            continue  # its call computes with the model's own
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in common:
                setattr(module, name, frozen(parameter.clone()))
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
    """Put layers that decode faster in the place of those below `parent`.

    Parameters are replaced, never changed, because another model may share them. Layers with fixed
    scales stay. `blocks` is the operation that reads weights in blocks, if there is one.
    """
    for name, child in list(parent.named_children()):
        if is_attached(child):
            continue  # computes by fixed scales, with its own float32 weights
        if isinstance(child, Linear):
            _replace_linear(parent, name, child, dtype, blocks)
            continue
        if isinstance(child, MoE) and not any(map(is_attached, child.modules())):
            child = _replace_mixture(parent, name, child, dtype, blocks)
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


def _replace_linear(
    parent: nn.Module, name: str, linear: Linear, dtype: torch.dtype, blocks: TokenStepOp | None
) -> None:
    _cast(linear, dtype)
    if blocks is not None:
        setattr(parent, name, BlockLinear(linear.weight, blocks))
    elif _can_pack(linear.weight):
        setattr(parent, name, PackedLinear(linear.weight))


def _replace_mixture(
    parent: nn.Module, name: str, moe: MoE, dtype: torch.dtype, blocks: TokenStepOp | None
) -> MoE:
    """Replace a mixture where that pays; return the one whose parts are to be replaced next."""
    experts = moe.experts
    _cast(experts, dtype)
    if experts.expert_step.takes(experts.up_proj, (1,)):
        moe = MoEStep(moe)
        setattr(parent, name, moe)
    elif experts.up_proj.device.type == "cpu":
        for part in (moe.shared_experts.up_proj, moe.shared_experts.down_proj):
            _cast(part, dtype)
        # many tokens still pass the old mixture, which the new one holds
        new = FewTokensMoE(moe) if blocks is None else BlockMoE(moe, blocks)
        setattr(parent, name, new)
    return moe


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, frozen(parameter.to(dtype)))


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
