"""Norms by kernels for CPUs; backward keeps the inputs and one number a row and group."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.jit.call import add_up, kernels, run, scratch

MODULE = "nemotron.ops.rms_norm.kernels"


class _Norm(torch.autograd.Function):
    """Both norms; `z` is absent in the plain one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "M D"],
        z: Float[Tensor, "M D"] | None,
        weight: Float[Tensor, " D"],
        groups: int,
        eps: float,
    ) -> Tensor:
        found = kernels(MODULE, x.dtype)
        y, scale = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[0], groups)
        values = _inputs(x, z, weight, groups) | scratch(x.shape[1] + found.LANES)
        values |= {"eps": eps, "scale": scale, "y": y}
        kernel = found.forward if z is None else found.gated_forward
        run(kernel, found.CALL, x.dtype, values)
        ctx.save_for_backward(x, z, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, scale = ctx.saved_tensors
        found = kernels(MODULE, x.dtype)
        rows, size = x.shape
        units = -(-rows // found.ROWS)
        dy, dx = _rows(dy), torch.empty(x.shape, dtype=x.dtype)
        dz = None if z is None else torch.empty(x.shape, dtype=z.dtype)
        parts = torch.empty(units, size)
        values = _inputs(x, z, weight, scale.shape[1]) | scratch(4 * (size + found.LANES))
        values |= {"units": units, "scale": scale, "dy": dy, "dy_row": dy.stride(0), "dx": dx}
        values |= {"dz": 0 if dz is None else dz, "parts": parts}
        kernel = found.backward if z is None else found.gated_backward
        run(kernel, found.CALL, x.dtype, values)
        return dx, dz, add_up(parts).to(weight.dtype), None, None


def _inputs(x: Tensor, z: Tensor | None, weight: Tensor, groups: int) -> dict[str, Any]:
    values: dict[str, Any] = {"rows": x.shape[0], "size": x.shape[1], "groups": groups}
    values |= {"x": x, "x_row": x.stride(0), "weight": weight.detach().float().contiguous()}
    return values | ({} if z is None else {"z": z, "z_row": z.stride(0)})


def _rows(t: Float[Tensor, "*batch D"]) -> Float[Tensor, "M D"]:
    """Return rows that each lie in one piece: slices of wider ones do."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*batch D"]:
    """The reference's formula in float32."""
    return _Norm.apply(_rows(x), None, weight, 1, eps).view(x.shape)


def gated_rms_norm(
    y: Float[Tensor, "*batch D"],
    z: Float[Tensor, "*batch D"],
    weight: Float[Tensor, " D"],
    groups: int,
    eps: float,
) -> Float[Tensor, "*batch D"]:
    """The reference's formula in float32."""
    return _Norm.apply(_rows(y), _rows(z), weight, groups, eps).view(y.shape)
