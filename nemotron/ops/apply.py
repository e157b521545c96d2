"""Which backends the operations of a model use: bound to its modules, not to the process."""

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from nemotron.ops.attention import attention
from nemotron.ops.causal_conv1d import causal_conv1d
from nemotron.ops.config import RECOMPUTED, OpsConfig, Recomputed
from nemotron.ops.expert_step import expert_step
from nemotron.ops.grouped_linear import grouped_linear
from nemotron.ops.grouped_mlp import grouped_mlp
from nemotron.ops.linear import linear, wide_linear
from nemotron.ops.linear_cross_entropy import linear_cross_entropy
from nemotron.ops.mamba_step import mamba_step
from nemotron.ops.registry import Operation
from nemotron.ops.rms_norm import gated_rms_norm, residual_rms_norm, rms_norm
from nemotron.ops.router_step import router_step
from nemotron.ops.routing import balance_sums, expert_order, token_copies, topk_routing
from nemotron.ops.squared_relu import squared_relu
from nemotron.ops.ssd import ssd
from nemotron.ops.token_step import token_step

ALL: tuple[Operation, ...] = (
    attention,
    balance_sums,
    causal_conv1d,
    expert_order,
    expert_step,
    gated_rms_norm,
    grouped_linear,
    grouped_mlp,
    linear,
    linear_cross_entropy,
    mamba_step,
    residual_rms_norm,
    rms_norm,
    router_step,
    squared_relu,
    ssd,
    token_copies,
    token_step,
    topk_routing,
    wide_linear,
)
"""Every operation, free to choose among its backends."""

GENERATION = frozenset({"expert_step", "mamba_step", "router_step", "token_step"})
"""Names of those that only generation calls."""

COMBINED = frozenset({"grouped_mlp", "residual_rms_norm"})
"""Names of those that training calls in place of others, where a backend is named or fit."""


def bind(choices: OpsConfig) -> dict[str, Operation]:
    """Return every operation by name, with the backend that the choices name.

    Raises:
        UserError: when a backend is unknown or its package is missing.
    """
    return {operation.name: operation.bind(getattr(choices, operation.name)) for operation in ALL}


def apply(model: nn.Module, choices: OpsConfig) -> None:
    """Let every module of the model call its operations with the backends that are chosen.

    Other models are not touched; a model to which this was never applied uses the fastest backends.

    Raises:
        UserError: when a backend is unknown or its package is missing.
    """
    bound = bind(choices)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Operation):
                setattr(module, name, bound[value.name])


def recompute(module: nn.Module, names: Collection[Recomputed]) -> None:
    """Let a module and those inside it recompute the results of these operations in backward.

    That needs the context `saving` of `nemotron.ops.recompute` around the module's forward pass.
    """
    chosen = frozenset().union(*(RECOMPUTED[name] for name in names))
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Operation) and value.name in chosen:
                setattr(part, name, replace(value, recomputed=True))
