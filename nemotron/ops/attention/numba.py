"""Attention by kernels for CPUs: no scores in memory, forward or backward."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.jit.call import kernels, run, scratch
from nemotron.ops.jit.vectors import LANES

UNITS = 16
"""Units of work that a gradient has at least, if there are keys enough."""
BLOCKS = 4
"""Blocks of keys that a segment has at least."""


class Form(NamedTuple):
    """Kernels, by how numbers lie while they are multiplied, and the room that they take.

    Both functions take a module of kernels and the values of a call.
    """

    module: str
    forward: Callable[[ModuleType, dict[str, Any]], dict[str, Any]]
    backward: Callable[[ModuleType, dict[str, Any]], dict[str, Any]]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "B T Hq Dh"],
        k: Float[Tensor, "B S Hkv Dh"],
        v: Float[Tensor, "B S Hkv Dh"],
        lows: Int[Tensor, "B T"],
        highs: Int[Tensor, "B T"],
        form: Form,
    ) -> Tensor:
        found = kernels(form.module, q.dtype)
        values = _inputs(q, k, v, lows, highs) | {"blocks": -(-k.shape[1] // found.KEYS)}
        y = torch.empty(q.shape)  # its gradient needs more digits than bfloat16 has
        tops, totals = torch.empty(2, values["sides"], values["columns"])
        values |= form.forward(found, values) | {"y": y, "tops": tops, "totals": totals}
        run(found.forward, found.CALL, q.dtype, values)
        ctx.save_for_backward(q, k, v, lows, highs, y, tops + totals.log2())
        ctx.form = form
        return y.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lows, highs, y, logs = ctx.saved_tensors
        found = kernels(ctx.form.module, q.dtype)
        values = _inputs(q, k, v, lows, highs)
        blocks = -(-k.shape[1] // found.KEYS)
        segments = max(1, min(-(-UNITS // values["sides"]), blocks // BLOCKS))
        size = -(-blocks // segments) * found.KEYS
        segments = -(-k.shape[1] // size)
        parts = torch.empty(segments, values["sides"], values["strips"], values["depth"], LANES)
        inner, dy = torch.empty_like(logs), _rows(dy)
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
        values |= {"segment": size, "segments": segments, "parts": parts, "inner": inner}
        values |= {"y": y, "logs": logs, "dq": dq, "dk": dk, "dv": dv} | _strides("dy", dy)
        run(found.backward, found.CALL, q.dtype, values | ctx.form.backward(found, values))
        return dq, dk, dv, None, None, None


def _forward(found: ModuleType, values: dict[str, Any]) -> dict[str, Any]:
    depth = values["depth"]
    keys = torch.empty(2, values["sides"] * values["blocks"] * found.KEYS * depth)
    numbers = found.COLUMNS * (2 * depth + 4) + LANES * depth + found.KEYS * LANES
    return {"keys": keys[0], "values": keys[1]} | scratch(numbers)


def _backward(found: ModuleType, values: dict[str, Any]) -> dict[str, Any]:
    depth = values["depth"]
    columns = found.PAIR * LANES * (2 * found.KEYS + 4 * depth + 4)
    return scratch(6 * values["segment"] * depth + columns)


FLOAT32 = Form("nemotron.ops.attention.kernels", _forward, _backward)
"""All numbers in float32."""


def _inputs(q: Tensor, k: Tensor, v: Tensor, lows: Tensor, highs: Tensor) -> dict[str, Any]:
    rows, length, heads, head_size = q.shape
    total, groups = k.shape[1:3]
    columns = length * (heads // groups)
    values: dict[str, Any] = {"rows": rows, "length": length, "total": total, "heads": heads}
    values |= {"groups": groups, "sides": rows * groups, "head_size": head_size}
    values |= {"depth": -(-head_size // LANES) * LANES, "columns": columns}
    values |= {"strips": -(-columns // LANES), "lows": lows, "highs": highs}
    values["next"] = torch.zeros(1, dtype=torch.int64)
    return values | _strides("q", q) | _strides("k", k) | _strides("v", v)


def _strides(name: str, t: Tensor) -> dict[str, Any]:
    row, token, head, _ = t.stride()
    return {name: t, f"{name}_row": row, f"{name}_token": token, f"{name}_head": head}


def _rows(t: Float[Tensor, "B T H Dh"]) -> Float[Tensor, "B T H Dh"]:
    """Return a tensor whose heads each lie in one piece: a slice of wider rows is one."""
    return t if t.stride(3) == 1 else t.contiguous()


def _bounds(
    rows: int,
    length: int,
    total: int,
    seq_idx: Int[Tensor, "B S"] | None,
    lengths: Int[Tensor, " B"] | None,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return the first and the last key that each query sees, int32."""
    ends = torch.full((rows,), total) if lengths is None else lengths
    last = ends[:, None] - length + torch.arange(length)
    if seq_idx is None:
        first = torch.zeros_like(last)
    else:
        position = torch.arange(total).expand(rows, -1)
        begins = torch.zeros(seq_idx.shape, dtype=torch.int64)
        begins[:, 1:] = position[:, 1:] * (seq_idx[:, 1:] != seq_idx[:, :-1])
        first = begins.cummax(1).values.gather(1, last)
    return first.int().contiguous(), last.int().contiguous()


def attention(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    seq_idx: Int[Tensor, "B S"] | None,
    lengths: Int[Tensor, " B"] | None,
    form: Form = FLOAT32,
) -> Float[Tensor, "B T Hq Dh"]:
    """Attend in float32, with products as the form takes them; the result is rounded once."""
    lows, highs = _bounds(q.shape[0], q.shape[1], k.shape[1], seq_idx, lengths)
    return _Attention.apply(_rows(q), _rows(k), _rows(v), lows, highs, form)
