"""The scan in short chunks by kernels for CPUs; the state before each chunk is kept."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.jit.call import kernels, run, scratch

MODULE = "nemotron.ops.ssd.kernels"


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state: Float[Tensor, "b H P N"] | None,
        ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        found = kernels(MODULE, x.dtype)
        b, length, heads, P = x.shape
        chunks, N = -(-length // found.CHUNK), B.shape[3]
        states = torch.empty(b, heads, chunks, P * N)
        last, y = torch.empty(b, heads, P, N), torch.empty(x.shape, dtype=x.dtype)
        values = _inputs(x, dt, A, B, C, D, ids, chunks)
        values |= scratch(found.forward_numbers(P, N, heads // B.shape[2]))
        values |= {"first": 0 if state is None else state, "last": last, "states": states, "y": y}
        run(found.forward, found.CALL, x.dtype, values)
        ctx.save_for_backward(x, dt, A, B, C, D, ids, states)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, ids, states = ctx.saved_tensors
        found = kernels(MODULE, x.dtype)
        dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype) for t in (x, B, C))
        dA, dD = torch.zeros(2, x.shape[0], x.shape[2], dtype=torch.float64)
        ddt, dy = torch.empty_like(dt), torch.zeros_like(x) if dy is None else _rows(dy)
        dlast = None if dlast is None else dlast.contiguous()
        b, _, heads, P = x.shape
        N = B.shape[3]
        dfirst = torch.empty(b, heads, P, N) if ctx.needs_input_grad[6] else None
        values = _inputs(x, dt, A, B, C, D, ids, states.shape[2])
        values |= scratch(found.backward_numbers(P, N, heads // B.shape[2]))
        values |= {"last": 0 if dlast is None else dlast, "states": states}
        values |= {"first": 0 if dfirst is None else dfirst, "dx": dx, "dB": dB, "dC": dC}
        values |= {"ddt": ddt, "dA": dA, "dD": dD}
        values |= {"dy": dy, "dy_row": dy.stride(0), "dy_token": dy.stride(1)}
        run(found.backward, found.CALL, x.dtype, values)
        return dx, ddt, dA.sum(0).float(), dB, dC, dD.sum(0).float(), dfirst, None


def _inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    ids: Tensor | None,
    chunks: int,
) -> dict[str, Any]:
    rows, length, heads, head_size = x.shape
    values: dict[str, Any] = {"dt": dt, "A": A, "D": D, "ids": 0 if ids is None else ids}
    for name, tensor in (("x", x), ("B", B), ("C", C)):
        values[name] = tensor
        values[f"{name}_row"], values[f"{name}_token"] = tensor.stride()[:2]
    values |= {"rows": rows, "length": length, "chunks": chunks, "heads": heads}
    return values | {"groups": B.shape[2], "head_size": head_size, "state_size": B.shape[3]}


def _rows(t: Float[Tensor, "b T H P"]) -> Float[Tensor, "b T H P"]:
    """Return a tensor whose tokens each lie in one piece: a slice of wider rows is one."""
    in_one = t.stride(3) == 1 and (t.stride(2) == t.shape[3] or t.shape[2] == 1)
    return t if in_one else t.contiguous()


def ssd(
    x: Float[Tensor, "B T H P"],
    dt: Float[Tensor, "B T H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B T G N"],
    C: Float[Tensor, "B T G N"],
    D: Float[Tensor, " H"],
    initial_state: Float[Tensor, "B H P N"] | None,
    seq_idx: Int[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B H P N"]]:
    """Scan chunk by chunk, in float32."""
    state = None if initial_state is None else initial_state.float().contiguous()
    ids = None if seq_idx is None else seq_idx.to(torch.int64).contiguous()
    inputs = (_rows(x), dt.contiguous(), A.contiguous(), _rows(B), _rows(C), D.contiguous())
    return _Scan.apply(*inputs, state, ids)
