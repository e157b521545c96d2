"""AdamW, and Muon for matrices, with decayed and undecayed parameters; gradient norms by kind."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron.ops.adamw import Kernel, Settings, kernel_for
from nemotron.ops.rounded import copy_of, keep_rounded, renew
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
        held: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> None:
        """Take the parameters, and what returns the part of one, or of a gradient, that is here.

        `matrices` puts together what ranks hold of them, for Muon.
        """
        self.config = config
        self.parameters = dict(parameters)
        self._held = held
        # a sharded parameter computes nothing with others here, and AdamW works on each element
        every = {name: held(p) for name, p in self.parameters.items()}
        is_on = config.name == "muon"
        own = {name: p for name, p in every.items() if is_on and is_matrix(name, p)}
        self._muon = Muon(own, config.muon, config.weight_decay, matrices) if own else None
        self._local = {name: p for name, p in every.items() if name not in own}
        decay = {n: config.weight_decay if decays(n, p) else 0.0 for n, p in self._local.items()}
        devices = {parameter.device for parameter in every.values()}
        kernel = kernel_for(config.kernel, *devices) if devices else None
        self._adamw = AdamW(self._local, decay, config.betas, config.eps, kernel)
        self._copies: dict[str, Tensor] = {}

    def keep_rounded(self, weights: Iterable[Tensor], dtype: torch.dtype) -> None:
        """Give these weights copies in a dtype, and bring those of parameters up to date."""
        keep_rounded(weights, dtype)
        copies = ((name, copy_of(parameter)) for name, parameter in self.parameters.items())
        self._copies = {name: copy for name, copy in copies if copy is not None}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Return what is here of the gradients that there are, by parameter name."""
        named = self.parameters.items()
        return {name: self._held(p.grad) for name, p in named if p.grad is not None}

    def step(self, lr: float, clip_coefficient: float = 1.0) -> None:
        """Scale the gradients by the coefficient and update the parameters and their copies."""
        gradients = self.gradients()
        if self._muon is not None:
            self._muon.step(gradients, lr, clip_coefficient)
        rest = {name: gradients[name] for name in self._local if name in gradients}
        self._adamw.step(rest, lr, clip_coefficient, self._copies)
        for name in self._copies.keys() & gradients.keys():
            if name not in rest:
                self._copies[name].copy_(self.parameters[name].detach())
            renew(self.parameters[name])

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the optimizer's own state, by key and parameter, for saving or loading."""
        momentum = {} if self._muon is None else {"momentum": self._muon.momentum}
        return self._adamw.state | momentum


class AdamW:
    """Updates tensors in place, each with its weight decay; the moments exist from the start.

    `torch.optim.AdamW` calls the same kernel, but imports PyTorch's compiler on the way, which
    takes two seconds at every start.
    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; the kernel is that
    of `torch.optim.AdamW(fused=True)`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        weight_decays: Mapping[str, float],
        betas: tuple[float, float],
        eps: float,
        kernel: Kernel | None = None,
    ) -> None:
        """Take float32 tensors of one device, the weight decay of each, and a kernel for them."""
        self._parameters, self._betas, self._eps = dict(parameters), betas, eps
        self._kernel = kernel
        self._groups: dict[float, list[str]] = {}
        for name in parameters:
            self._groups.setdefault(weight_decays[name], []).append(name)
        items = parameters.items()
        self.state: dict[str, dict[str, Tensor]] = {
            "step": {name: torch.zeros((), device=p.device) for name, p in items},
            "exp_avg": {name: torch.zeros_like(p) for name, p in items},
            "exp_avg_sq": {name: torch.zeros_like(p) for name, p in items},
        }
        """By key and parameter; the step counts updates, in float32."""

    @torch.no_grad()
    def step(
        self,
        gradients: Mapping[str, Tensor],
        lr: float,
        clip_coefficient: float,
        copies: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Update every tensor that has a gradient, which is scaled by the coefficient.

        `copies` hold the new values, too, in a dtype of their own.
        """
        for weight_decay, group in self._groups.items():
            if names := [name for name in group if name in gradients]:
                steps, averages, squares = (
                    [of_key[name] for name in names] for of_key in self.state.values()
                )
                torch._foreach_add_(steps, 1)
                (self._kernel or _torchs)(
                    [self._parameters[name] for name in names],
                    [gradients[name] for name in names],
                    averages,
                    squares,
                    steps,
                    [copies.get(name) if copies else None for name in names],
                    Settings(lr, self._betas, self._eps, weight_decay, clip_coefficient),
                )


def _torchs(
    parameters: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor | None],
    settings: Settings,
) -> None:
    scale, device = {}, parameters[0].device
    if device.type == "cuda":
        # the kernel divides by it, which saves a pass over the gradients
        scale["grad_scale"] = torch.full((), 1 / settings.coefficient, device=device)
        scale["found_inf"] = torch.zeros((), device=device)
    elif settings.coefficient < 1.0:
        torch._foreach_mul_(gradients, settings.coefficient)
    torch._fused_adamw_(
        parameters,
        gradients,
        averages,
        squares,
        [],
        steps,
        lr=settings.lr,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        amsgrad=False,
        maximize=False,
        **scale,
    )
    for parameter, copy in zip(parameters, copies, strict=True):
        if copy is not None:
            copy.copy_(parameter)


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
