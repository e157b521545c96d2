"""The layers of a prepared model as one stack of weights, which a compiled step reads."""

import math

import torch
from torch import Tensor, nn

from nemotron.generate.block_layers import BlockLinear, BlockMoE
from nemotron.model.attention import Attention
from nemotron.model.block import Block
from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import MLP, RMSNorm
from nemotron.model.mamba2 import Mamba2
from nemotron.ops.token_step.stack import (
    AttentionWeights,
    DenseWeights,
    ExpertsWeights,
    JoinWeights,
    LayerWeights,
    MambaWeights,
    Matrix,
    Stack,
)


def stack_of(model: HybridLM, dtype: torch.dtype) -> Stack:
    """Return the layers of a model that `block_layers` has prepared."""
    norm = model.backbone.norm_f
    return Stack(
        model.backbone.embeddings.weight.detach(),
        tuple(_weights_of(block) for block in model.backbone.layers if isinstance(block, Block)),
        _vector(norm.weight),
        norm.eps,
        dtype,
    )


def stack_ahead(model: HybridLM, dtype: torch.dtype) -> Stack:
    """Return the multi-token-prediction block of a model that `block_layers` has prepared."""
    assert model.mtp is not None, "the model has no multi-token-prediction block"
    blocks = [block for block in model.mtp.layers if isinstance(block, Block)]
    first, last = blocks[0].get_submodule, blocks[-1].get_submodule
    enorm, hnorm, norm = first("enorm"), first("hnorm"), last("final_layernorm")
    assert isinstance(enorm, RMSNorm), enorm
    assert isinstance(hnorm, RMSNorm), hnorm
    assert isinstance(norm, RMSNorm), norm
    return Stack(
        model.backbone.embeddings.weight.detach(),
        tuple(map(_weights_of, blocks)),
        _vector(norm.weight),
        norm.eps,
        dtype,
        JoinWeights(
            _vector(enorm.weight), _vector(hnorm.weight), _matrix(first("eh_proj")), enorm.eps
        ),
    )


def _weights_of(block: Block) -> LayerWeights:
    norm, eps, mixer = _vector(block.norm.weight), block.norm.eps, block.mixer
    if isinstance(mixer, Mamba2):
        return _mamba(norm, eps, mixer)
    if isinstance(mixer, BlockMoE):
        return _experts(norm, eps, mixer)
    if isinstance(mixer, MLP):
        return DenseWeights(norm, _matrix(mixer.up_proj), _matrix(mixer.down_proj), eps)
    assert isinstance(mixer, Attention), mixer
    qkv = _matrix(mixer.get_submodule("qkv_proj"))
    size, o_proj = mixer.head_dim, _matrix(mixer.o_proj)
    queries = o_proj.num_inputs // size
    keys = (qkv.num_outputs // size - queries) // 2
    return AttentionWeights(norm, qkv, o_proj, queries, keys, size, eps)


def _mamba(norm: Tensor, eps: float, mixer: Mamba2) -> MambaWeights:
    bias = mixer.conv1d.bias
    smallest, largest = mixer.time_step_limit
    return MambaWeights(
        norm=norm,
        in_proj=_matrix(mixer.in_proj),
        kernel=_vector(mixer.conv1d.weight.squeeze(1).T),
        bias=None if bias is None else _vector(bias),
        decay=_vector(-mixer.A_log.detach().exp()),
        skip=_vector(mixer.D),
        dt_bias=_vector(mixer.dt_bias),
        limits=(smallest, largest if largest < math.inf else torch.finfo(torch.float32).max),
        gate_norm=_vector(mixer.norm.weight),
        out_proj=_matrix(mixer.out_proj),
        num_groups=mixer.num_groups,
        state_size=mixer.state_size,
        eps=eps,
        gate_eps=mixer.norm.eps,
    )


def _experts(norm: Tensor, eps: float, mixer: BlockMoE) -> ExpertsWeights:
    moe, gate = mixer.moe, mixer.moe.gate
    to_latent, from_latent = (
        None if part is None else _matrix(part)
        for part in (moe.fc1_latent_proj, moe.fc2_latent_proj)
    )
    return ExpertsWeights(
        norm=norm,
        router=Matrix.of(gate.weight, torch.float32),
        router_bias=_vector(gate.e_score_correction_bias),
        top_k=gate.top_k,
        normalize=gate.normalize,
        scaling=gate.scaling,
        up=mixer.up,
        down=mixer.down,
        shared_up=_matrix(moe.shared_experts.up_proj),
        shared_down=_matrix(moe.shared_experts.down_proj),
        to_latent=to_latent,
        from_latent=from_latent,
        eps=eps,
    )


def _matrix(module: nn.Module) -> Matrix:
    assert isinstance(module, BlockLinear), module
    return module.matrix


def _vector(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()
