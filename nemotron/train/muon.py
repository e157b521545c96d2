"""Muon: the update of a matrix is its momentum, made orthogonal by Newton-Schulz iterations.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", and
`torch.optim.Muon`; Liu et al. 2025, "Muon is Scalable for LLM Training" (the scale of AdamW).
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.model.init import STACKED
from nemotron.train.config import MuonConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial, whose slope at 0 is large."""
EPS = 1e-7
OUTSIDE_LAYERS = ("backbone.embeddings.", "lm_head.")
"""Matrices that look up or score tokens, one row for each; AdamW updates them."""


class Matrices(Protocol):
    """How the matrices of a parameter are put together from what ranks hold of it."""

    def is_here(self, name: str) -> bool:
        """Say whether whole matrices of the parameter are here."""
        ...

    def gather(self, name: str, held: Tensor) -> Tensor:
        """Return the whole matrices."""
        ...

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return what is here of whole matrices."""
        ...


class Muon:
    """Updates matrices, and stacks of them, in place; the momentum exists from the start."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: MuonConfig,
        weight_decay: float,
        matrices: Matrices | None,
    ) -> None:
        """Take what is here of each matrix; without `matrices`, all are whole."""
        self._config, self._weight_decay, self._matrices = config, weight_decay, matrices
        self._parameters = dict(parameters)
        self.momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], lr: float, clip_coefficient: float) -> None:
        """Update every matrix that has a gradient; the gradients are scaled in place."""
        momentum = self._config.momentum
        for name, parameter in self._parameters.items():
            if (gradient := gradients.get(name)) is None:
                continue
            if clip_coefficient < 1.0:
                gradient.mul_(clip_coefficient)
            average = self.momentum[name].lerp_(gradient, 1 - momentum)
            update = gradient.lerp(average, momentum) if self._config.nesterov else average
            parameter.mul_(1 - lr * self._weight_decay)
            parameter.sub_(self._orthogonal(name, update), alpha=lr)

    def _orthogonal(self, name: str, update: Tensor) -> Tensor:
        """Return what is here of the orthogonal matrices, scaled."""
        here = self._matrices is None or self._matrices.is_here(name)
        if self._matrices is None or here:
            return orthogonalize(update, self._config.steps) * self._scale(update)
        whole = self._matrices.gather(name, update)
        return self._matrices.part(name, orthogonalize(whole, self._config.steps)) * self._scale(
            whole
        )

    def _scale(self, whole: Tensor) -> float:
        """Return the factor that gives updates of all shapes a like size."""
        rows, columns = whole.shape[-2:]
        if self._config.scale == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Say whether Muon updates a parameter: the matrices inside layers, each expert's by itself."""
    if name.startswith(OUTSIDE_LAYERS):
        return False
    return parameter.ndim == 2 or name.endswith(STACKED)


def orthogonalize(update: Float[Tensor, "*n R C"], steps: int) -> Float[Tensor, "*n R C"]:
    """Return about U V^T for a matrix U S V^T, in float32; each of a stack by itself.

    The products are in bfloat16, as in the sources; singular values end between 0.5 and 1.5.
    """
    if not update.numel():
        return update
    a, b, c = COEFFICIENTS
    x = update.bfloat16()
    if is_tall := update.shape[-2] > update.shape[-1]:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).float()
