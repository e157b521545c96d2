"""AdamW with decayed and undecayed parameters, gradient norms by kind, and the skip decision."""

import re
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron.model.config import LAYER_KINDS, ModelConfig
from nemotron.train.config import OptimizerConfig

PARTS_OF_MOE = {
    "mixer.experts.": "experts",
    "mixer.shared_experts.": "shared",
    "mixer.fc1_latent_proj.": "latent",
    "mixer.fc2_latent_proj.": "latent",
}
"""Kinds inside a mixture layer; what is left, its norm and its gate, counts as router."""


class Optimizer:
    """torch's fused AdamW on named float32 parameters.

    The moments exist from the start, so that a checkpoint has the same tensors at every step.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        named = self.parameters.items()
        groups = [
            {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
            {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
        for parameter in self.parameters.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._adamw.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients that there are, by parameter name."""
        return {n: p.grad for n, p in self.parameters.items() if p.grad is not None}

    def step(self, lr: float, clip_coefficient: float = 1.0) -> None:
        """Scale the gradients by the coefficient and update the parameters."""
        if clip_coefficient < 1.0:
            torch._foreach_mul_(list(self.gradients().values()), clip_coefficient)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state as it is, for saving it or for loading into it."""
        return {
            f"{key}.{name}": tensor
            for name, parameter in self.parameters.items()
            for key, tensor in self._adamw.state[parameter].items()
        }


def decays(name: str, parameter: Tensor) -> bool:
    """Say whether weight decay applies: to matrices and convolutions, not to vectors or biases.

    Source: NVIDIA/Megatron-LM: megatron/core/optimizer/__init__.py,
    get_standard_config_overrides.
    """
    return parameter.ndim > 1 and not name.endswith(".bias")


def kind_of(name: str, config: ModelConfig) -> str:
    """Return the group under which a parameter's gradient norm is reported."""
    if name.startswith("mtp."):
        return "mtp"
    if name.startswith("backbone.embeddings."):
        return "embed"
    layer = re.match(r"backbone\.layers\.(\d+)\.(.*)", name)
    if layer is None:
        return "head"  # lm_head and the norm before it
    kind = LAYER_KINDS[config.hybrid_override_pattern[int(layer[1])]]
    if kind != "moe":
        return kind
    parts = (part for start, part in PARTS_OF_MOE.items() if layer[2].startswith(start))
    return next(parts, "router")


class GradientNorms:
    """Euclidean norms of all gradients and of those of each kind, left on the device."""

    def __init__(self, gradients: dict[str, Tensor], kinds: dict[str, str]) -> None:
        """Take the norm of each tensor once; `kinds` maps every parameter name to its kind."""
        self._kinds = [kinds[name] for name in gradients]
        norms = torch._foreach_norm(list(gradients.values()))
        self._squares = torch.stack([norm.float() for norm in norms]).square()

    def total(self) -> Float[Tensor, ""]:
        """Return the norm over all parameters."""
        return self._squares.sum().sqrt()

    def by_kind(self) -> dict[str, float]:
        """Return the norm of each kind; waits for the device."""
        sums: dict[str, float] = {}
        for kind, square in zip(self._kinds, self._squares.tolist(), strict=True):
            sums[kind] = sums.get(kind, 0.0) + square
        return {kind: value**0.5 for kind, value in sums.items()}


def clip_coefficient(norm: float, limit: float | None) -> float:
    """Return the factor, at most 1, that brings a gradient of this norm down to the limit."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


def parameter_kinds(names: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """Return the kind of every named parameter."""
    return {name: kind_of(name, config) for name in names}
