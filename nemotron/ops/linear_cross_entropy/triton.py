"""Head and cross entropy on a GPU: cuBLAS products, and a Triton pass over the logits of a chunk.

The logits of a chunk have the dtype of the hidden states. The pass that finds a row's loss puts the
row's slope in their place, so two more products give both gradients. No row is sorted out: rows
without a label have slope 0, and the host never waits for the device.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.launch import LOG2_E, power_of_2
from nemotron.ops.linear_cross_entropy import IGNORED, add_product
from nemotron.ops.rounded import rounded
from nemotron.ops.tuning.tunable import Configuration, Tunable

# at 4096 rows the products run at full speed, and the head's gradient is added to only twice
CHUNK_ROWS = 4096
# 4096 rows of 131072 logits in bfloat16
CHUNK_BYTES = 1 << 30
# stays finite when multiplied by log2 e, and no logit is smaller
LOWEST = -1e38


@triton.jit
def _row_statistics(row_ptr, V, BLOCK: tl.constexpr, STAGES: tl.constexpr, LOG2_E: tl.constexpr,
                    LOWEST: tl.constexpr):  # fmt: skip
    # each lane keeps a maximum and a sum of its own: one exponential a logit, and no barriers
    peaks = tl.full([BLOCK], LOWEST, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        smaller = tl.exp2(-tl.abs(x - peaks) * LOG2_E)
        sums = tl.where(x <= peaks, sums + smaller, sums * smaller + 1.0)
        peaks = tl.maximum(peaks, x)
    peak = tl.max(peaks, 0)
    return peak, tl.sum(sums * tl.exp2((peaks - peak) * LOG2_E), 0)


@triton.jit
def _write_slope(row_ptr, V, label, peak, total, share, BLOCK: tl.constexpr, STAGES: tl.constexpr,
                 LOG2_E: tl.constexpr):  # fmt: skip
    scale = share / total
    blocks = tl.cdiv(V, BLOCK)
    for step in tl.range(0, blocks, num_stages=STAGES):
        # backwards: what was read last is the likeliest to be in the cache
        columns = (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
        slope = tl.exp2((x - peak) * LOG2_E) * scale
        slope = tl.where(columns == label, slope - share, slope)
        tl.store(row_ptr + columns, slope.to(row_ptr.dtype.element_ty), mask=columns < V)


@triton.jit
def _write_zeros(row_ptr, V, BLOCK: tl.constexpr):
    for start in tl.range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], row_ptr.dtype.element_ty)
        tl.store(row_ptr + columns, zeros, mask=columns < V)


@triton.jit
def _losses(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    losses_ptr,
    peaks_ptr,
    totals_ptr,
    V,
    logits_stride,
    IGNORED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    LOG2_E: tl.constexpr,
    LOWEST: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    label = tl.load(labels_ptr + row)
    if label == IGNORED:
        tl.store(losses_ptr + row, 0.0)
        if SLOPE:
            _write_zeros(row_ptr, V, BLOCK)
        if KEEP:
            tl.store(peaks_ptr + row, 0.0)
            tl.store(totals_ptr + row, 1.0)
    else:
        peak, total = _row_statistics(row_ptr, V, BLOCK, STAGES, LOG2_E, LOWEST)
        # a label outside the vocabulary shows in the loss
        known = (label >= 0) & (label < V)
        picked = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        loss = (peak - picked) + tl.log2(total) / LOG2_E
        share = 1.0
        if WEIGHTED:
            share = tl.load(weights_ptr + row).to(tl.float32)
        tl.store(losses_ptr + row, loss * share)
        if SLOPE:
            # another thread may still be reading the logit of the label
            tl.debug_barrier()
            _write_slope(row_ptr, V, label, peak, total, share, BLOCK, STAGES, LOG2_E)
        if KEEP:
            tl.store(peaks_ptr + row, peak)
            tl.store(totals_ptr + row, total)


@triton.jit
def _slopes(
    logits_ptr,
    labels_ptr,
    shares_ptr,
    peaks_ptr,
    totals_ptr,
    V,
    logits_stride,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    label = tl.load(labels_ptr + row)
    if label == IGNORED:
        _write_zeros(row_ptr, V, BLOCK)
    else:
        peak = tl.load(peaks_ptr + row)
        total = tl.load(totals_ptr + row)
        share = tl.load(shares_ptr + row).to(tl.float32)
        _write_slope(row_ptr, V, label, peak, total, share, BLOCK, STAGES, LOG2_E)


LOSSES = Tunable(
    "linear_cross_entropy",
    "losses",
    (_losses,),
    ("vocabulary",),
    # one program fills a multiprocessor, so that the rows in work stay in the L2 cache until they
    # are read again
    {"block": 16384, "warps": 32, "stages": 1},
    {"block": (2048, 4096, 8192, 16384, 32768), "warps": (8, 16, 32), "stages": (1, 2, 3, 4)},
    reorders=("block", "warps", "stages"),
)


class _SummedLoss(torch.autograd.Function):
    """The gradient is computed with the loss, while the logits are at hand, and scaled later."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        recorded: bool,
    ) -> Tensor:
        # without a record, a parameter would still ask for its gradient
        needs_hidden, needs_weight = (recorded and needs for needs in ctx.needs_input_grad[:2])
        hidden, labels = hidden.contiguous(), labels.contiguous()
        weights = None if weights is None else weights.contiguous()
        matrix = rounded(weight, hidden.dtype)
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        for rows, logits in _logits(hidden, matrix):
            _launch_losses(
                logits,
                labels[rows],
                None if weights is None else weights[rows],
                losses[rows],
                slope=needs_hidden or needs_weight,
            )
            if grad_hidden is not None:
                torch.mm(logits, matrix, out=grad_hidden[rows])
            if needs_weight:
                grad_weight = add_product(grad_weight, logits.T, hidden[rows])
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            if ctx.weight_dtype == grad_weight.dtype:
                # in place, as large as it is; autograd refuses a second backward after that
                grad_weight = grad_weight.mul_(grad)
            else:
                grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


class _LossPerToken(torch.autograd.Function):
    """The logits of a chunk are computed again for its gradient, their statistics are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        hidden, labels = hidden.contiguous(), labels.contiguous()
        losses, peaks, totals = (
            torch.empty(labels.shape, dtype=torch.float32, device=hidden.device) for _ in range(3)
        )
        for rows, logits in _logits(hidden, rounded(weight, hidden.dtype)):
            _launch_losses(logits, labels[rows], None, losses[rows], peaks[rows], totals[rows])
        ctx.save_for_backward(hidden, weight, labels, peaks, totals)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, labels, peaks, totals = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        matrix, grad = rounded(weight, hidden.dtype), grad.contiguous()
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        for rows, logits in _logits(hidden, matrix):
            launch = _launch(logits)
            _slopes[(logits.shape[0],)](
                logits,
                labels[rows],
                grad[rows],
                peaks[rows],
                totals[rows],
                logits.shape[1],
                logits.stride(0),
                IGNORED=IGNORED,
                BLOCK=launch["block"],
                STAGES=launch["stages"],
                LOG2_E=LOG2_E,
                num_warps=launch["warps"],
            )
            if grad_hidden is not None:
                torch.mm(logits, matrix, out=grad_hidden[rows])
            if needs_weight:
                grad_weight = add_product(grad_weight, logits.T, hidden[rows])
        if needs_weight:
            if grad_weight is None:
                grad_weight = torch.zeros_like(weight)
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None


def _logits(
    hidden: Float[Tensor, "M D"], matrix: Float[Tensor, "V D"]
) -> Iterator[tuple[slice, Float[Tensor, "rows V"]]]:
    """Yield the rows of each chunk and their logits, which the next chunk's overwrite."""
    num_rows, size = hidden.shape[0], chunk_rows(hidden, matrix)
    buffer = hidden.new_empty(min(size, num_rows), matrix.shape[0])
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        logits = buffer[: rows.stop - rows.start]
        torch.mm(hidden[rows], matrix.T, out=logits)
        yield rows, logits


def chunk_rows(hidden: Float[Tensor, "M D"], matrix: Float[Tensor, "V D"]) -> int:
    """Return the rows of a chunk: all chunks about as long, and none above either limit."""
    num_rows = max(1, hidden.shape[0])
    most = min(CHUNK_ROWS, CHUNK_BYTES // (matrix.shape[0] * hidden.element_size()))
    even = triton.cdiv(num_rows, triton.cdiv(num_rows, max(128, most)))
    return triton.cdiv(even, 128) * 128


def _launch(logits: Float[Tensor, "rows V"]) -> Configuration:
    found = LOSSES.at(logits, logits.shape[1])
    return {**found, "block": min(found["block"], power_of_2(logits.shape[1]))}


def _launch_losses(
    logits: Float[Tensor, "rows V"],
    labels: Int[Tensor, " rows"],
    weights: Float[Tensor, " rows"] | None,
    losses: Float[Tensor, " rows"],
    peaks: Float[Tensor, " rows"] | None = None,
    totals: Float[Tensor, " rows"] | None = None,
    *,
    slope: bool = False,
) -> None:
    """Write the weighted losses and, where asked, the statistics; the slope replaces the logits."""
    launch = _launch(logits)
    _losses[(logits.shape[0],)](
        logits,
        labels,
        losses if weights is None else weights,
        losses,
        losses if peaks is None else peaks,
        losses if totals is None else totals,
        logits.shape[1],
        logits.stride(0),
        IGNORED=IGNORED,
        WEIGHTED=weights is not None,
        SLOPE=slope,
        KEEP=peaks is not None,
        BLOCK=launch["block"],
        STAGES=launch["stages"],
        LOG2_E=LOG2_E,
        LOWEST=LOWEST,
        num_warps=launch["warps"],
    )


def linear_cross_entropy(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " M"],
    reduction: Literal["sum", "none"],
    weights: Float[Tensor, " M"] | None = None,
) -> Tensor:
    """The reference's loss; a label outside the vocabulary makes it NaN."""
    if reduction == "sum":
        return _SummedLoss.apply(hidden, weight, labels, weights, torch.is_grad_enabled())
    losses = _LossPerToken.apply(hidden, weight, labels)
    return losses if weights is None else losses * weights
