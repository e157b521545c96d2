"""Causal depthwise convolution with SiLU."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.causal_conv1d import cuda
from nemotron.ops.registry import Backend, Operation, numba_backend, triton_backend

BLOCK_ELEMENTS = 1 << 18
"""Elements of the float32 block that is worked on at a time: about one core's cache."""


class CausalConv1dOp(Operation):
    """Convolve each channel with its own kernel of width W over the past, then apply SiLU.

    `initial_state` holds the W-1 inputs before `x` (zeros when absent) and belongs to document 0;
    with `seq_idx`, inputs of another document count as zero. Result in the dtype of `x`.
    """

    def __call__(
        self,
        x: Float[Tensor, "B T C"],
        weight: Float[Tensor, "C W"],
        bias: Float[Tensor, " C"] | None,
        *,
        initial_state: Float[Tensor, "B W1 C"] | None = None,
        seq_idx: Int[Tensor, "B T"] | None = None,
        activation: bool = True,
    ) -> Float[Tensor, "B T C"]:
        function = self.select(
            x,
            documents=seq_idx is not None,
            initial_state=initial_state is not None,
            documents_after_a_state=seq_idx is not None and initial_state is not None,
            # x may be a slice of a wider tensor
            any_width=any(number % 8 for number in (x.shape[2], *x.stride()[:2])),
        )
        return function(x, weight, bias, initial_state, seq_idx, activation)


def reference(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None,
    initial_state: Float[Tensor, "B W1 C"] | None,
    seq_idx: Int[Tensor, "B T"] | None,
    activation: bool,
) -> Float[Tensor, "B T C"]:
    """Sum W products in float32 or wider; an input of another document counts as zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    width, length = weight.shape[1], x.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    inputs = torch.cat([initial_state, x], dim=1).to(wide)
    y = torch.zeros_like(x, dtype=wide)
    for offset in range(width):
        term = inputs[:, offset : offset + length] * weight[:, offset].to(wide)
        if seq_idx is not None:
            ids = F.pad(seq_idx, (width - 1, 0))  # what came before x belongs to document 0
            term = term * (ids[:, offset : offset + length] == seq_idx).unsqueeze(-1)
        y = y + term
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation else y).to(x.dtype)


class _BlockedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        activation: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, initial_state, seq_idx)
        ctx.activation = activation
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for row, tokens in _blocks(x):
            sums = _convolve(_Window(x, weight, initial_state, seq_idx, row, tokens), bias)
            y[row, tokens] = F.silu(sums, inplace=True) if activation else sums
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state, seq_idx = ctx.saved_tensors
        width = weight.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weight = torch.zeros(width, x.shape[2], dtype=wide, device=x.device)
        grad_bias = torch.zeros(x.shape[2], dtype=wide, device=x.device)
        grad_state = torch.zeros_like(initial_state) if initial_state is not None else None
        # gradient of the inputs of a block, and of the W - 1 inputs before it, newest block first
        later: Tensor | None = None
        for row, tokens in reversed(_blocks(x)):
            window = _Window(x, weight, initial_state, seq_idx, row, tokens)
            grad_sums = grad[row, tokens].to(wide)
            if ctx.activation:
                sums = _convolve(window, bias)
                sigmoid = sums.sigmoid()
                slope = sums.mul_(1 - sigmoid).add_(1).mul_(sigmoid)  # d silu
                grad_sums = slope.mul_(grad_sums)
            grad_bias += grad_sums.sum(0)
            length = grad_sums.shape[0]
            inputs = torch.zeros(length + width - 1, x.shape[2], dtype=wide, device=x.device)
            for offset in range(width):
                part = window.masked(grad_sums, offset)
                grad_weight[offset] += (part * window.inputs(offset)).sum(0)
                inputs[offset : offset + length].addcmul_(part, window.weight[offset])
            if later is not None and tokens.stop < x.shape[1]:
                inputs[length:] += later
            grad_x[row, tokens] = inputs[width - 1 :]
            later = inputs[: width - 1]
            if tokens.start == 0 and grad_state is not None:
                grad_state[row] = later
        return (
            grad_x,
            grad_weight.T.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            grad_state,
            None,
            None,
        )


class _Window:
    """A block of tokens of one row, with the W - 1 inputs that come before it."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        row: int,
        tokens: slice,
    ) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        self.length, before = tokens.stop - tokens.start, weight.shape[1] - 1
        self.weight = weight.to(wide).T.contiguous()  # [W C]
        missing = max(0, before - tokens.start)
        values = x[row, max(0, tokens.start - before) : tokens.stop].to(wide)
        if missing:
            if initial_state is None:
                head = values.new_zeros(missing, values.shape[1])
            else:
                head = initial_state[row, before - missing :].to(wide)
            values = torch.cat([head, values])
        self.values = values  # [length + W - 1, C]
        self.ids = None
        if seq_idx is not None:
            # what comes before the row belongs to document 0
            self.ids = F.pad(seq_idx[row], (before, 0))[tokens.start : tokens.stop + before]

    def inputs(self, offset: int) -> Tensor:
        return self.values[offset : offset + self.length]

    def masked(self, values: Tensor, offset: int) -> Tensor:
        """Zero the tokens whose input at this offset belongs to another document."""
        if self.ids is None:
            return values
        last = self.ids.shape[0] - self.length
        same = self.ids[offset : offset + self.length] == self.ids[last:]
        return values * same.unsqueeze(-1)


def _convolve(window: _Window, bias: Tensor | None) -> Tensor:
    width = window.weight.shape[0]
    sums = window.masked(window.inputs(0) * window.weight[0], 0)
    for offset in range(1, width):
        if window.ids is None:
            sums.addcmul_(window.inputs(offset), window.weight[offset])
        else:
            sums += window.masked(window.inputs(offset) * window.weight[offset], offset)
    return sums if bias is None else sums.add_(bias)


def _blocks(x: Tensor) -> list[tuple[int, slice]]:
    size = max(8, BLOCK_ELEMENTS // x.shape[2])
    return [
        (row, slice(first, min(first + size, x.shape[1])))
        for row in range(x.shape[0])
        for first in range(0, x.shape[1], size)
    ]


def blocked(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None,
    initial_state: Float[Tensor, "B W1 C"] | None,
    seq_idx: Int[Tensor, "B T"] | None,
    activation: bool,
) -> Float[Tensor, "B T C"]:
    """The reference's sum, block by block."""
    return _BlockedConv.apply(x, weight, bias, initial_state, seq_idx, activation)


causal_conv1d = CausalConv1dOp(
    "causal_conv1d",
    [
        triton_backend(
            "nemotron.ops.causal_conv1d.triton",
            "causal_conv1d",
            features=frozenset(
                {"documents", "initial_state", "documents_after_a_state", "any_width"}
            ),
        ),
        cuda.backend,
        numba_backend(
            "nemotron.ops.causal_conv1d.numba",
            "causal_conv1d",
            features=frozenset(
                {"documents", "initial_state", "documents_after_a_state", "any_width"}
            ),
        ),
        Backend(
            "blocked",
            blocked,
            devices=frozenset({"cpu"}),
            features=frozenset(
                {"documents", "initial_state", "documents_after_a_state", "any_width"}
            ),
        ),
        Backend(
            "reference",
            reference,
            features=frozenset(
                {"documents", "initial_state", "documents_after_a_state", "any_width"}
            ),
        ),
    ],
)
