"""The weighted activation of experts by kernels for CPUs; without a weight torch's is as fast."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.jit.call import kernels, run, scratch

MODULE = "nemotron.ops.squared_relu.kernels"


class _WeightedSquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "M F"], weight: Float[Tensor, "M 1"]) -> Tensor:
        found = kernels(MODULE, x.dtype)
        x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        run(found.forward, found.CALL, x.dtype, _inputs(x, weight) | {"y": y})
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        found = kernels(MODULE, x.dtype)
        dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.empty(weight.shape)
        values = _inputs(x, weight) | scratch(2 * x.shape[1])
        values |= {"dy": dy.contiguous(), "dx": dx, "dweight": dweight}
        run(found.backward, found.CALL, x.dtype, values)
        return dx, dweight.to(weight.dtype)


def _inputs(x: Tensor, weight: Tensor) -> dict[str, Any]:
    weight = weight.detach().float().contiguous()
    return {"rows": x.shape[0], "size": x.shape[1], "x": x, "weight": weight}


def squared_relu(
    x: Float[Tensor, "*batch F"], weight: Float[Tensor, "*batch 1"] | None
) -> Float[Tensor, "*batch F"]:
    """The reference's formula in float32."""
    if weight is None:
        from nemotron.ops.squared_relu import blocked

        return blocked(x, None)
    return _WeightedSquaredReLU.apply(x, weight)
