"""Which parameters of a built model are trained: all, some parts, or adapters."""

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from nemotron.errors import UserError
from nemotron.model.adapter import Adapter
from nemotron.model.build import build_on_meta
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import Linear
from nemotron.model.moe import Experts
from nemotron.train.config import AdapterConfig, TuneConfig
from nemotron.train.kinds import kind_of

ROLES = {
    r"(in_proj|out_proj|q_proj|k_proj|v_proj|o_proj)": None,
    r"(up_proj|down_proj)": "mlp",
    r"shared_experts\.(up_proj|down_proj)": "shared",
    r"fc[12]_latent_proj": "latent",
    r"experts": "experts",
}
"""Roles by the name of a module inside a mixer; None: the name itself."""


def apply_tuning(model: HybridLM, config: TuneConfig) -> None:
    """Freeze what is not trained of a whole model, before it is laid out over ranks.

    Raises:
        UserError: when a target of the adapters matches no layer.
    """
    for name, parameter in model.named_parameters():
        if config.adapter is not None or kind_of(name, model.config) in config.freeze:
            parameter.requires_grad_(False)
    if config.adapter is not None:
        _add_adapters(model, config.adapter, config.freeze)


def trained_shares(model: ModelConfig, config: TuneConfig) -> list[str]:
    """Return how many parameters of each part or role are trained, in lines; none if all are.

    Raises:
        UserError: as `apply_tuning` does.
    """
    built = build_on_meta(model)
    apply_tuning(built, config)
    whole, own = Counter[str](), Counter[str]()
    for name, parameter in built.named_parameters():
        module = re.sub(r"\.((up_|down_)?adapter\..*|weight|up_proj|down_proj)$", "", name)
        part = role_of(module) if config.adapter is not None else None
        part = part or kind_of(name, model)
        whole[part] += parameter.numel()
        own[part] += parameter.numel() if parameter.requires_grad else 0
    if own == whole:
        return []
    total = sum(whole.values())
    lines = [f"{_share(sum(own.values()), total)} of all parameters"]
    return lines + [f"{part}: {_share(own[part], number)}" for part, number in whole.items()]


def role_of(module: str) -> str | None:
    """Return the role of a module of the backbone, by its name, if adapters know it."""
    match = re.fullmatch(r"backbone\.layers\.\d+\.mixer\.(.+)", module)
    if match is None:
        return None
    for pattern, role in ROLES.items():
        if re.fullmatch(pattern, match[1]):
            return role or match[1]
    return None


def _add_adapters(model: HybridLM, config: AdapterConfig, freeze: tuple[str, ...]) -> None:
    found: set[str] = set()
    known: set[str] = set()
    for name, module in list(_targets(model)):
        role = role_of(name)
        assert role is not None, name
        known.add(role)
        is_frozen = kind_of(f"{name}.", model.config) in freeze
        if is_frozen or role not in (config.targets or known - _beyond(config)):
            continue
        found.add(role)
        _adapt(module, config)
    for role in config.targets:
        if role not in found:
            raise UserError(
                f"matches no layer; this model has {', '.join(sorted(known))}, and tune.freeze "
                "takes parts of them away.",
                key="tune.adapter.targets",
                value=role,
            )
    if not found:
        raise UserError("leaves no layer to adapt; take parts off the list.", key="tune.freeze")


def _targets(model: HybridLM) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear | Experts) and role_of(name) is not None:
            yield name, module


def _beyond(config: AdapterConfig) -> set[str]:
    """Return the roles that this kind of adapter does not know."""
    return {"experts"} if config.kind == "dora" else set()


def _adapt(module: nn.Module, config: AdapterConfig) -> None:
    rank, scale, dora = config.rank, config.alpha / config.rank, config.kind == "dora"
    if isinstance(module, Linear):
        with torch.device(module.weight.device):
            module.adapter = Adapter(module.weight.shape, rank, scale, dora=dora)
    elif isinstance(module, Experts):
        with torch.device(module.up_proj.device):
            module.up_adapter = Adapter(module.up_proj.shape, rank, scale, dora=False)
            module.down_adapter = Adapter(module.down_proj.shape, rank, scale, dora=False)


def _share(own: int, whole: int) -> str:
    return f"{own:,} of {whole:,} trained ({own / whole:.2%})"
