"""Copies and sums of token rows by Triton kernels: one pass each, no atomic adds."""

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.launch import power_of_2
from nemotron.ops.tuning.tunable import Tunable


@triton.jit
def _copy(
    x_ptr,
    token_ptr,
    rows_ptr,
    num_rows,
    width,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(token_ptr + row, mask=row < num_rows, other=0).to(tl.int64)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + token[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    at = rows_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, x, mask=inside)


@triton.jit
def _add(
    rows_ptr,
    place_ptr,
    starts_ptr,
    sums_ptr,
    num_tokens,
    num_copies,
    width,
    rows_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(starts_ptr + token).to(tl.int32)
    has_next = token + 1 < num_tokens
    end = tl.load(starts_ptr + token + 1, mask=has_next, other=num_copies).to(tl.int32)
    total = tl.zeros([COLUMNS], tl.float32)
    for turn in tl.range(start, end, ROWS):
        for step in tl.static_range(ROWS):
            is_copy = turn + step < end
            place = tl.load(place_ptr + turn + step, mask=is_copy, other=0).to(tl.int64)
            at = rows_ptr + place * rows_stride + column
            inside = (column < width) & is_copy
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = sums_ptr + token.to(tl.int64) * width + column
    tl.store(at, total.to(sums_ptr.dtype.element_ty), mask=column < width)


# 1,024 columns are 16 bytes of bfloat16 a thread, and a width of 2688 fills nine tenths of three
# blocks
COPY = Tunable(
    "token_copies",
    "copy",
    (_copy,),
    ("rows", "width"),
    # four loads in flight a thread hide the look-up of the token
    {"columns": 1024, "warps": 4, "rows": 4},
    {"columns": (256, 512, 1024, 2048, 4096), "warps": (2, 4, 8), "rows": (1, 2, 4, 8, 16)},
)
ADD = Tunable(
    "token_copies",
    "add",
    (_add,),
    ("rows", "tokens", "width"),
    # rows of a token that are on their way at a time; a top-k of 6 takes one turn, 22 takes three
    {"columns": 1024, "warps": 4, "rows": 8},
    {"columns": (256, 512, 1024, 2048, 4096), "warps": (1, 2, 4, 8), "rows": (2, 4, 6, 8, 16)},
)


class _TokenCopies(torch.autograd.Function):
    """The gradient of either direction is the other direction."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, token: Tensor, place: Tensor, starts: Tensor, is_copy: bool
    ) -> Tensor:
        ctx.is_copy = is_copy
        if is_copy:
            ctx.save_for_backward(place, starts)
            return _launch_copy(values, token)
        ctx.save_for_backward(token)
        return _launch_add(values, place, starts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        launch = _launch_add if ctx.is_copy else _launch_copy
        return launch(grad, *ctx.saved_tensors), None, None, None, None


def _launch_copy(x: Float[Tensor, "M I"], token: Int[Tensor, " R"]) -> Float[Tensor, "R I"]:
    x, token = _readable(x), token.contiguous()
    num_rows, width = token.shape[0], x.shape[1]
    rows = x.new_empty(num_rows, width)
    launch = COPY.at(x, num_rows, width)
    columns, height = min(launch["columns"], power_of_2(width)), launch["rows"]
    if num_rows:
        _copy[(triton.cdiv(num_rows, height), triton.cdiv(width, columns))](
            x,
            token,
            rows,
            num_rows,
            width,
            x.stride(0),
            ROWS=height,
            COLUMNS=columns,
            num_warps=launch["warps"],
        )
    return rows


def _launch_add(
    rows: Float[Tensor, "R I"], place: Int[Tensor, " copies"], starts: Int[Tensor, " M"]
) -> Float[Tensor, "M I"]:
    rows, place, starts = _readable(rows), place.contiguous(), starts.contiguous()
    num_tokens, width = starts.shape[0], rows.shape[1]
    sums = rows.new_empty(num_tokens, width)
    launch = ADD.at(rows, rows.shape[0], num_tokens, width)
    columns = min(launch["columns"], power_of_2(width))
    if num_tokens:
        _add[(num_tokens, triton.cdiv(width, columns))](
            rows,
            place,
            starts,
            sums,
            num_tokens,
            place.shape[0],
            width,
            rows.stride(0),
            ROWS=launch["rows"],
            COLUMNS=columns,
            num_warps=launch["warps"],
        )
    return sums


def _readable(values: Float[Tensor, "rows I"]) -> Float[Tensor, "rows I"]:
    return values if values.stride(1) == 1 else values.contiguous()


def token_copies(
    values: Float[Tensor, "before I"],
    token: Int[Tensor, " R"],
    place: Int[Tensor, " copies"],
    starts: Int[Tensor, " M"],
    direction: Literal["copy", "add"],
) -> Float[Tensor, "after I"]:
    """Copies bit for bit; sums in float32, in the order of `place`, rounded once."""
    return _TokenCopies.apply(values, token, place, starts, direction == "copy")
