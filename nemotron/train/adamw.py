"""AdamW: PyTorch's fused kernel on named tensors.

`torch.optim.AdamW` calls the same kernel, but imports PyTorch's compiler on the way, which takes
two seconds at every start.
Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; the kernel is that of
`torch.optim.AdamW(fused=True)`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class AdamW:
    """Updates tensors in place, each with its weight decay; the moments exist from the start."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        weight_decays: Mapping[str, float],
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Take float32 tensors, all on one device, and the weight decay of each."""
        self._parameters, self._betas, self._eps = dict(parameters), betas, eps
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
    def step(self, gradients: Mapping[str, Tensor], lr: float, clip_coefficient: float) -> None:
        """Update every tensor that has a gradient, which is scaled by the coefficient."""
        if not gradients:
            return
        scale = self._scale(gradients, clip_coefficient)
        for weight_decay, group in self._groups.items():
            if names := [name for name in group if name in gradients]:
                steps, averages, squares = (
                    [of_key[name] for name in names] for of_key in self.state.values()
                )
                torch._foreach_add_(steps, 1)
                torch._fused_adamw_(
                    [self._parameters[name] for name in names],
                    [gradients[name] for name in names],
                    averages,
                    squares,
                    [],
                    steps,
                    lr=lr,
                    beta1=self._betas[0],
                    beta2=self._betas[1],
                    weight_decay=weight_decay,
                    eps=self._eps,
                    amsgrad=False,
                    maximize=False,
                    **scale,
                )

    def _scale(self, gradients: Mapping[str, Tensor], coefficient: float) -> dict[str, Tensor]:
        """Scale the gradients, or have the kernel do it, which saves a pass over them.

        The kernel divides by `grad_scale`, and skips when `found_inf` is not zero.
        """
        device = next(iter(gradients.values())).device
        if device.type == "cuda":
            scale = torch.full((), 1 / coefficient, device=device)
            return {"grad_scale": scale, "found_inf": torch.zeros((), device=device)}
        if coefficient < 1.0:
            torch._foreach_mul_(list(gradients.values()), coefficient)
        return {}
