"""Tensor parallelism: ranks share heads, channels and vocabulary, and between layers the tokens.

The residual stream holds this rank's tokens, [B, T / ranks, D]: norms, router and latent
projections see no others. Around a mixer or a shared expert, hooks gather the tokens and scatter
the sum of what all ranks' channels made of them.
Source: NVIDIA/Megatron-LM: megatron/core/tensor_parallel/layers.py (sequence parallelism, after
Korthikanti et al. 2022) and megatron/core/ssm/mamba_mixer.py.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemotron.model.attention import Attention
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import MLP, Embedding, Head
from nemotron.model.mamba2 import Mamba2
from nemotron.model.moe import Experts
from nemotron.model.router import routers
from nemotron.parallel.collectives import Group, all_gather, reduce_scatter
from nemotron.parallel.shards import Shard, local_of
from nemotron.parallel.vocabulary import Vocabulary


@dataclass(frozen=True)
class Placement:
    """Which dimension of a parameter the ranks share: its outputs (0) or its inputs (1)."""

    dim: int
    components: str = ""
    """What lies packed along it; each is cut by itself, as every rank needs some of each."""
    heads: str | None = None
    """Setting that counts the heads; where they are too few, every rank holds them all."""


KEYS = Placement(0, heads="num_key_value_heads")

PLACEMENTS: dict[type[nn.Module], dict[str, Placement]] = {
    Mamba2: {
        "in_proj.weight": Placement(0, "z x B C dt"),
        "conv1d.weight": Placement(0, "x B C"),
        "conv1d.bias": Placement(0, "x B C"),
        "A_log": Placement(0),
        "D": Placement(0),
        "dt_bias": Placement(0),
        # a rank has whole groups, so the gated norm's mean square is its own
        "norm.weight": Placement(0),
        "out_proj.weight": Placement(1),
    },
    Attention: {
        "q_proj.weight": Placement(0),
        "k_proj.weight": KEYS,
        "v_proj.weight": KEYS,
        "o_proj.weight": Placement(1),
    },
    MLP: {"up_proj.weight": Placement(0), "down_proj.weight": Placement(1)},
    Embedding: {"weight": Placement(0)},
    Head: {"weight": Placement(0)},
}
"""Parameters of which each rank holds a part, by the module that they belong to.

All others are whole on every rank, where they meet only its tokens, or only some of its heads.
"""


@dataclass(frozen=True)
class TensorPlan:
    """What became of the parameters; those of routed experts are in neither."""

    shards: dict[str, Shard]
    """What this rank holds of each that was cut."""
    replicated: frozenset[str]
    """Whole ones: their gradient on a rank is one summand, see `sum_partial_gradients`."""


def apply_tensor(model: HybridLM, group: Group, rank: int, size: int) -> TensorPlan:
    """Cut the model's parameters and register what moves tokens between the ranks of the group.

    The model then takes whole rows and returns the hidden states of this rank's tokens. The loss
    of the head is that of all ranks' tokens; the balance loss only that of this rank's. Sizes must
    be divisible, as `dims.violations` says.
    """
    cut: dict[nn.Parameter, tuple[nn.Parameter, Shard]] = {}  # a tied table is cut once
    for module in model.modules():
        placements = PLACEMENTS.get(type(module))
        if placements is None:
            continue
        for name, parameter in list(module.named_parameters()):
            shard = shard_of(parameter.shape, placements[name], model.config, rank, size)
            if shard is None:
                continue
            if parameter not in cut:
                local = shard.take(parameter.detach()).clone()
                cut[parameter] = nn.Parameter(local, parameter.requires_grad), shard
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, cut[parameter][0])
        _connect(module, model.config, group, rank, size)
    for router in routers(model).values():
        router.own_tokens = lambda tokens: tokens.chunk(size, 1)[rank]
    if model.language is not None:
        model.language.own_tokens = lambda tokens: tokens.chunk(size, 1)[rank]
    shards = dict(cut.values())
    experts = {p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    names = dict(model.named_parameters())
    return TensorPlan(
        {name: shards[p] for name, p in names.items() if p in shards},
        frozenset(name for name, p in names.items() if p not in shards and p not in experts),
    )


def shard_of(
    shape: torch.Size, placement: Placement, config: ModelConfig, rank: int, size: int
) -> Shard | None:
    """Return a rank's shard of a parameter, or None where every rank holds the whole."""
    if placement.heads is not None and getattr(config, placement.heads) < size:
        return None
    lengths = [shape[placement.dim]]
    if placement.components:
        groups = config.n_groups * config.ssm_state_size
        inner, heads = config.mamba_inner_size, config.mamba_num_heads
        channels = {"z": inner, "x": inner, "B": groups, "C": groups, "dt": heads}
        lengths = [channels[name] for name in placement.components.split()]
    assert sum(lengths) == shape[placement.dim], (lengths, shape)
    ranges, offset = [], 0
    for length in lengths:
        assert length % size == 0, (length, size)
        share = length // size
        ranges.append((offset + rank * share, offset + (rank + 1) * share))
        offset += length
    return Shard(shape, placement.dim, tuple(ranges))


def _connect(module: nn.Module, config: ModelConfig, group: Group, rank: int, size: int) -> None:
    """Make a module whose parameters were cut work with the same module of the other ranks."""
    vocabulary = Vocabulary(group, rank, size)
    if isinstance(module, Embedding):
        vars(module)["forward"] = lambda ids: vocabulary.embed(ids, module.weight)
        return
    if isinstance(module, Head):
        _share_head(module, vocabulary)
        return
    if isinstance(module, Mamba2):
        module.num_heads //= size
        module.num_groups //= size
        module.splits = [length // size for length in module.splits]
    elif isinstance(module, Attention) and config.num_key_value_heads < size:
        _keep_head(module, rank * config.num_key_value_heads // size)
    _share_tokens(module, group)


def _share_head(head: Head, vocabulary: Vocabulary) -> None:
    def loss(
        hidden: Tensor, labels: Tensor, weights: Tensor | None = None, detach: bool = False
    ) -> Tensor:
        weight = head.weight.detach() if detach else head.weight
        return vocabulary.loss(hidden, weight, labels, weights)

    def token_logprobs(hidden: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        return vocabulary.token_logprobs(hidden / temperature, head.weight, labels)

    vars(head)["loss"] = loss
    vars(head)["token_logprobs"] = token_logprobs
    vars(head)["forward"] = lambda hidden: vocabulary.logits(hidden, head.weight)


def _keep_head(attention: Attention, head: int) -> None:
    """Use one of the key-value heads, which all query heads of this rank read."""
    size = attention.head_dim

    def narrow(_: nn.Module, __: Any, heads: Tensor) -> Tensor:
        return heads.narrow(-1, head * size, size).clone()  # FSDP wants no view of a unit

    attention.k_proj.register_forward_hook(narrow)
    attention.v_proj.register_forward_hook(narrow)


def _share_tokens(module: nn.Module, group: Group) -> None:
    """Let the module see all ranks' tokens, with its part of the channels."""

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return all_gather(inputs[0], 1, group), *inputs[1:]

    def after(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return reduce_scatter(output, 1, group)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


@torch.no_grad()
def sum_partial_gradients(
    parameters: Mapping[str, nn.Parameter], names: Collection[str], group: Group
) -> None:
    """Add up the named gradients over the ranks, in float32: once a step, after all backwards.

    Of a sharded gradient, each rank's shard is added to the same shard of the others. A parameter
    that got no gradient here must have got none anywhere.
    """
    # in the order of the model: that of a set differs between processes
    gradients = [p.grad for name, p in parameters.items() if name in names and p.grad is not None]
    local = [local_of(gradient) for gradient in gradients]
    if not local:
        return
    wide = torch.promote_types(local[0].dtype, torch.float32)
    total = torch.cat([part.flatten().to(wide) for part in local])
    dist.all_reduce(total, group=group)
    for part, summed in zip(local, total.split([part.numel() for part in local]), strict=True):
        part.copy_(summed.view_as(part))
