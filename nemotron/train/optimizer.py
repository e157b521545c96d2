"""AdamW, and Muon for matrices, with decayed and undecayed parameters; gradient norms by kind."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron.parallel.shards import local_of
from nemotron.train.adamw import AdamW
from nemotron.train.config import OptimizerConfig
from nemotron.train.muon import Matrices, Muon, is_matrix


class Optimizer:
    """AdamW on named float32 parameters, on what of each is here; Muon for matrices.

    The moments exist from the start, so that a checkpoint has the same tensors at every step.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        matrices: Matrices | None = None,
    ) -> None:
        """Take the parameters; `matrices` puts together what ranks hold of them, for Muon."""
        self.config = config
        self.parameters = dict(parameters)
        # a sharded parameter computes nothing with others here, and AdamW works on each element
        every = {name: local_of(p) for name, p in self.parameters.items()}
        is_on = config.name == "muon"
        own = {name: p for name, p in every.items() if is_on and is_matrix(name, p)}
        self._muon = Muon(own, config.muon, config.weight_decay, matrices) if own else None
        self._local = {name: p for name, p in every.items() if name not in own}
        decay = {n: config.weight_decay if decays(n, p) else 0.0 for n, p in self._local.items()}
        self._adamw = AdamW(self._local, decay, config.betas, config.eps)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Return what is here of the gradients that there are, by parameter name."""
        named = self.parameters.items()
        return {name: local_of(p.grad) for name, p in named if p.grad is not None}

    def step(self, lr: float, clip_coefficient: float = 1.0) -> None:
        """Scale the gradients by the coefficient and update the parameters."""
        gradients = self.gradients()
        if self._muon is not None:
            self._muon.step(gradients, lr, clip_coefficient)
        rest = {name: gradients[name] for name in self._local if name in gradients}
        self._adamw.step(rest, lr, clip_coefficient)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the optimizer's state as it is, by key and parameter, for saving or loading."""
        momentum = {} if self._muon is None else {"momentum": self._muon.momentum}
        return self._adamw.state | momentum


def decays(name: str, parameter: Tensor) -> bool:
    """Say whether weight decay applies: to matrices and convolutions, not to vectors or biases.

    Source: NVIDIA/Megatron-LM: megatron/core/optimizer/__init__.py,
    get_standard_config_overrides.
    """
    return parameter.ndim > 1 and not name.endswith(".bias")


class GradientNorms:
    """Euclidean norms of all gradients and of those of each kind, left on the device."""

    def __init__(self, squares: Float[Tensor, " kinds"], kinds: Sequence[str]) -> None:
        """Take the sum of squares of each kind, over all ranks."""
        self._squares, self._kinds = squares, kinds

    def total(self) -> Float[Tensor, ""]:
        """Return the norm over all parameters."""
        return self._squares.sum().sqrt()

    def by_kind(self) -> dict[str, float]:
        """Return the norm of each kind; waits for the device."""
        return dict(zip(self._kinds, self._squares.sqrt().tolist(), strict=True))


def squares_by_kind(
    gradients: Mapping[str, Tensor], kind_of: Mapping[str, str], kinds: Sequence[str]
) -> Float[Tensor, " kinds"]:
    """Return the sum of squares of the gradients of each kind; what has no kind is not counted."""
    norms = torch._foreach_norm(list(gradients.values()))
    squares = torch.stack([norm.double() for norm in norms]).square()
    # the last place takes what is not counted
    index = [kinds.index(kind_of[n]) if n in kind_of else len(kinds) for n in gradients]
    total = squares.new_zeros(len(kinds) + 1)
    return total.index_add_(0, torch.tensor(index).to(squares.device), squares)[:-1]


def clip_coefficient(norm: float, limit: float | None) -> float:
    """Return the factor, at most 1, that brings a gradient of this norm down to the limit."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
