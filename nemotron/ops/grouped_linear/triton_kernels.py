"""Products of experts' rows in one launch for all experts, whose counts the device knows.

Sums are taken in float32. The activation of experts is part of the product that it follows, and its
slope part of the product before it, so that neither is a pass of its own. Tiles come by Hopper's
bulk copies where sizes are multiples of what is read at once, else by loads of each thread.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nemotron.ops.grouped_linear.tiles import TILE, Plan, locate
from nemotron.ops.launch import INTERPRETED, Launcher, power_of_2
from nemotron.ops.tuning.tunable import Tunable

PLAIN, ACTIVATE, SLOPE = range(3)
"""What becomes of a product: itself, its weighted squared ReLU, or, where it is the gradient of
that, the gradient of what was activated."""


@triton.jit
def _load(source, row, column, rows, columns, BULK: tl.constexpr, WIDE: tl.constexpr,
          HIGH: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Load a tile of a matrix, with 0 outside; the interpreter multiplies it as float32."""
    if BULK:
        tile = source.load([row, column])
    else:
        lane, beside = row + tl.arange(0, HIGH), column + tl.arange(0, WIDTH)
        at = lane.to(tl.int64)[:, None] * columns + beside[None, :]
        mask = (lane < rows)[:, None] & (beside < columns)[None, :]
        tile = tl.load(source + at, mask=mask, other=0.0)
    if WIDE:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _by_rows(a, b, hidden, weights, activated, parts, out, bounds, rows, columns, contracted,
             GROUPS: tl.constexpr, SIZE: tl.constexpr, TRANSPOSED: tl.constexpr,
             EPILOGUE: tl.constexpr, BULK: tl.constexpr, WIDE: tl.constexpr,
             WIDTH: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    group, _, first, end = locate(tile, bounds, rows, GROUPS, SIZE, True, TILE)
    if group > GROUPS:
        return
    # rows of no expert become zeros
    held = tl.minimum(group, GROUPS - 1)
    steps = tl.where(group < GROUPS, (contracted + STEP - 1) // STEP, 0)
    left_column = block * WIDTH
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    for step in range(steps):
        left = _load(a, first, step * STEP, rows, contracted, BULK, WIDE, TILE, STEP)
        if TRANSPOSED:
            right = _load(b, held * columns + left_column, step * STEP, (held + 1) * columns,
                          contracted, BULK, WIDE, WIDTH, STEP).T  # fmt: skip
        else:
            right = _load(b, held * contracted + step * STEP, left_column, (held + 1) * contracted,
                          columns, BULK, WIDE, STEP, WIDTH)  # fmt: skip
        sums = tl.dot(left, right, sums, input_precision="ieee")
    lane, column = tl.arange(0, TILE), left_column + tl.arange(0, WIDTH)
    row, is_row = first + lane, first + lane < end
    # a tile's place takes 64 bits, what is inside it 32: half the registers of addresses
    place = first.to(tl.int64) * columns
    at = lane[:, None] * columns + column[None, :]
    mask = is_row[:, None] & (column < columns)[None, :]
    if EPILOGUE == 0:
        tl.store(out + place + at, sums.to(out.dtype.element_ty), mask=mask)
    else:
        if EPILOGUE == 1:
            narrow = sums.to(hidden.dtype.element_ty)
            tl.store(hidden + place + at, narrow, mask=mask)
            x = narrow.to(tl.float32)
        else:
            x = tl.load(hidden + place + at, mask=mask, other=0.0).to(tl.float32)
        # written so that NaN stays NaN, as torch's relu has it
        positive = tl.where(x < 0, 0.0, x)
        weight = tl.load(weights + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
        result = positive * positive * weight
        tl.store(activated + place + at, result.to(activated.dtype.element_ty), mask=mask)
        if EPILOGUE == 2:
            product = positive * sums
            part = tl.sum(positive * product, 1)
            tl.store(parts + block.to(tl.int64) * rows + row, part, mask=is_row)
            slope = 2.0 * weight * product
            tl.store(out + place + at, slope.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _by_experts(a, b, out, bounds, rows, high, wide, GROUPS: tl.constexpr, BULK: tl.constexpr,
                WIDE: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
                TILE: tl.constexpr):  # fmt: skip
    across, down, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = tl.load(bounds + group), tl.load(bounds + group + 1)
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    whole = (end - first) // STEP
    for step in range(whole):
        at = first + step * STEP
        left = _load(a, at, down * TILE, rows, high, BULK, WIDE, STEP, TILE)
        right = _load(b, at, across * WIDTH, rows, wide, BULK, WIDE, STEP, WIDTH)
        sums = tl.dot(left.T, right, sums, input_precision="ieee")
    at = first + whole * STEP
    if at < end:
        # what follows is another expert's, or no number at all
        held = (at + tl.arange(0, STEP) < end)[:, None]
        left = _load(a, at, down * TILE, rows, high, BULK, WIDE, STEP, TILE)
        right = _load(b, at, across * WIDTH, rows, wide, BULK, WIDE, STEP, WIDTH)
        left, right = tl.where(held, left, 0.0), tl.where(held, right, 0.0)
        sums = tl.dot(left.T, right, sums, input_precision="ieee")
    lane, column = tl.arange(0, TILE), across * WIDTH + tl.arange(0, WIDTH)
    place = (group.to(tl.int64) * high + down * TILE) * wide
    at = lane[:, None] * wide + column[None, :]
    mask = (down * TILE + lane < high)[:, None] & (column < wide)[None, :]
    tl.store(out + place + at, sums.to(out.dtype.element_ty), mask=mask)


_by_rows_on, _by_experts_on = Launcher(_by_rows), Launcher(_by_experts)

AXES = ("groups", "rows", "columns", "contracted")
# 8 warps are two groups of four, each with the sums of 64 rows; of tiles that narrow, with three
# stages of 32 KiB, two programs have room: one multiplies while the other stores; the slopes' one
# takes all registers
TUNABLES = tuple(
    Tunable(
        "grouped_linear",
        launch,
        (kernel,),
        AXES,
        {"width": 128, "step": 64, "warps": 8, "stages": stages},
        {"width": (64, 128, 256), "step": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4, 5)},
        reorders=("width", "step", "warps"),
    )
    for launch, kernel, stages in (
        ("by_rows", _by_rows, 3),
        ("by_rows_back", _by_rows, 3),
        ("activated", _by_rows, 3),
        ("slopes", _by_rows, 4),
        ("by_experts", _by_experts, 3),
    )
)
ROWS, ROWS_BACK, ACTIVATED, SLOPES, EXPERTS = TUNABLES


def multiply(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], plan: Plan
) -> Float[Tensor, "R N"]:
    """Return each expert's rows times its matrix, transposed."""
    y = x.new_empty(x.shape[0], weight.shape[1])
    _launch(ROWS, x, weight, plan, y, transposed=True)
    return y


def multiply_back(
    dy: Float[Tensor, "R N"], weight: Float[Tensor, "E N K"], plan: Plan
) -> Float[Tensor, "R K"]:
    """Return each expert's rows times its matrix."""
    dx = dy.new_empty(dy.shape[0], weight.shape[2])
    _launch(ROWS_BACK, dy, weight, plan, dx, transposed=False)
    return dx


def activate(
    x: Float[Tensor, "R K"],
    weight: Float[Tensor, "E N K"],
    weights: Float[Tensor, "R 1"],
    plan: Plan,
) -> tuple[Float[Tensor, "R N"], Float[Tensor, "R N"]]:
    """Return `multiply`, rounded, and its squared ReLU times the weight of each row."""
    hidden, activated = (x.new_empty(x.shape[0], weight.shape[1]) for _ in range(2))
    _launch(ACTIVATED, x, weight, plan, activated, hidden, weights, activated, transposed=True)
    return hidden, activated


def slopes(
    dy: Float[Tensor, "R N"],
    weight: Float[Tensor, "E N K"],
    hidden: Float[Tensor, "R K"],
    weights: Float[Tensor, "R 1"],
    plan: Plan,
) -> tuple[Float[Tensor, "R K"], Float[Tensor, "R K"], Float[Tensor, "R 1"]]:
    """Return the gradients of `hidden` and `weights`, and between them what `activate` returned.

    `dy` are gradients of what the activated rows became, multiplied by `weight`.
    """
    grad, activated = torch.empty_like(hidden), torch.empty_like(hidden)
    grad_weights = _launch(
        SLOPES, dy, weight, plan, grad, hidden, weights, activated, transposed=False
    )
    assert grad_weights is not None
    return grad, activated, grad_weights.to(weights.dtype).unsqueeze(1)


def multiply_columnwise(
    dy: Float[Tensor, "R N"], x: Float[Tensor, "R K"], plan: Plan, dtype: torch.dtype
) -> Float[Tensor, "E N K"]:
    """Return the sum over each expert's rows of their outer products; 0 without rows."""
    (rows, high), wide = dy.shape, x.shape[1]
    out = dy.new_empty(plan.groups, high, wide, dtype=dtype)
    launch = EXPERTS.at(x, plan.groups, rows, wide, high)
    width, step = launch["width"], launch["step"]
    # rows in memory are pieces of 16 bytes
    bulk = _is_bulk((dy, x), (high, wide), 8)
    _by_experts_on(
        (-(-wide // width), -(-high // TILE), plan.groups),
        (_source(dy, step, TILE, bulk), _source(x, step, width, bulk), out, plan.bounds),
        (rows, high, wide),
        (plan.groups, bulk, INTERPRETED, width, step, TILE),
        num_warps=launch["warps"], num_stages=launch["stages"],
    )  # fmt: skip
    return out


def _launch(
    tunable: Tunable,
    a: Float[Tensor, "R contracted"],
    b: Float[Tensor, "E high wide"],
    plan: Plan,
    out: Float[Tensor, "R columns"],
    hidden: Float[Tensor, "R columns"] | None = None,
    weights: Float[Tensor, "R 1"] | None = None,
    activated: Float[Tensor, "R columns"] | None = None,
    *,
    transposed: bool,
) -> Float[Tensor, " R"] | None:
    """Multiply rows into `out`; for slopes, return the gradients of the rows' weights."""
    (rows, contracted), columns = a.shape, out.shape[1]
    launch = tunable.at(a, plan.groups, rows, columns, contracted)
    width, step = launch["width"], launch["step"]
    blocks, epilogue = -(-columns // width), PLAIN
    parts = None
    if tunable is ACTIVATED:
        epilogue = ACTIVATE
    elif tunable is SLOPES:
        epilogue = SLOPE
        parts = torch.empty(blocks, rows, dtype=torch.float32, device=a.device)
    # a step beyond the matrix of one expert would read the next one's
    bulk = _is_bulk((a, b), (contracted, b.shape[2]), step)
    matrices = b.flatten(0, 1)
    high, wide = (width, step) if transposed else (step, width)
    _by_rows_on(
        (blocks, plan.tiles, 1),
        (_source(a, TILE, step, bulk), _source(matrices, high, wide, bulk),
         out if hidden is None else hidden, out if weights is None else weights,
         out if activated is None else activated, out if parts is None else parts, out,
         plan.bounds),
        (rows, columns, contracted),
        (plan.groups, power_of_2(plan.groups + 2), transposed, epilogue, bulk, INTERPRETED, width,
         step, TILE),
        num_warps=launch["warps"], num_stages=launch["stages"],
    )  # fmt: skip
    return None if parts is None else parts.sum(0)


def _is_bulk(tensors: tuple[Tensor, ...], sizes: tuple[int, ...], multiple: int) -> bool:
    """Say whether tiles can come by bulk copies."""
    return (
        not INTERPRETED
        and all(size % multiple == 0 for size in sizes)
        and all(tensor.data_ptr() % 16 == 0 and tensor.is_contiguous() for tensor in tensors)
    )


def _source(matrix: Float[Tensor, "high wide"], high: int, wide: int, bulk: bool) -> Any:
    """Return what a kernel loads tiles from: a description for bulk copies, or the tensor."""
    return TensorDescriptor.from_tensor(matrix, [high, wide]) if bulk else matrix
