"""The convolution by kernels for CPUs: one pass forward, one backward."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.jit.call import add_up, kernels, run, scratch

MODULE = "nemotron.ops.causal_conv1d.kernels"


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        ids: Tensor | None,
        activation: bool,
    ) -> Tensor:
        found = kernels(MODULE, x.dtype)
        y = torch.empty(x.shape, dtype=x.dtype)
        values = _inputs(x, weight, bias, state, ids, activation) | scratch(
            x.shape[2] + found.LANES
        )
        run(found.forward, found.CALL, x.dtype, values | {"y": y})
        ctx.save_for_backward(x, weight, bias, state, ids)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, state, ids = ctx.saved_tensors
        found = kernels(MODULE, x.dtype)
        values = _inputs(x, weight, bias, state, ids, ctx.activation)
        channels, width = weight.shape
        dx, dy = torch.empty(x.shape, dtype=x.dtype), _rows(dy)
        dstate = None if state is None else torch.zeros(state.shape)
        parts = torch.empty(values["rows"] * values["blocks"], width + 1, channels)
        values |= {"dy": dy, "dy_row": dy.stride(0), "dy_token": dy.stride(1), "dx": dx}
        values |= {"dstate": 0 if dstate is None else dstate, "parts": parts}
        run(found.backward, found.CALL, x.dtype, values | scratch(found.numbers(width, channels)))
        sums = add_up(parts)
        return (
            dx,
            sums[:width].T.to(weight.dtype),
            None if bias is None else sums[width].to(bias.dtype),
            None if dstate is None else dstate.to(state.dtype),
            None,
            None,
        )


def _inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    ids: Tensor | None,
    activation: bool,
) -> dict[str, Any]:
    rows, length, channels = x.shape
    blocks = -(-length // kernels(MODULE, x.dtype).TOKENS)
    values: dict[str, Any] = {"rows": rows, "length": length, "blocks": blocks}
    values |= {"channels": channels, "width": weight.shape[1], "activation": activation}
    values |= {"x": x, "x_row": x.stride(0), "x_token": x.stride(1)}
    values["weight"] = weight.detach().T.float().contiguous()
    values["bias"] = torch.zeros(channels) if bias is None else bias.detach().float().contiguous()
    values["state"] = 0 if state is None else state.detach().float().contiguous()
    return values | {"ids": 0 if ids is None else ids}


def _rows(t: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
    """Return a tensor whose tokens each lie in one piece: a slice of wider rows is one."""
    return t if t.stride(2) == 1 else t.contiguous()


def causal_conv1d(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None,
    initial_state: Float[Tensor, "B W1 C"] | None,
    seq_idx: Int[Tensor, "B T"] | None,
    activation: bool,
) -> Float[Tensor, "B T C"]:
    """The reference's sum in float32."""
    ids = None if seq_idx is None else seq_idx.to(torch.int64).contiguous()
    return _Conv.apply(_rows(x), weight, bias, initial_state, ids, activation)
