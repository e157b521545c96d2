"""AdamW by a Triton kernel: 28 bytes a parameter, and 2 for its copy in bfloat16.

torch's kernel moves 32, because it writes the scaled gradients back, and leaves no copy.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.adamw import Settings
from nemotron.ops.launch import Launcher
from nemotron.ops.tuning.tunable import Tunable

NUMBERS = 12
"""float32 numbers that a tensor has in the table; a multiple of 16 bytes."""


@triton.jit
def _update(
    numbers_ptr,
    gradient_ptr,
    average_ptr,
    square_ptr,
    copy_ptr,
    parameter_ptr,
    size,
    ELEMENTS: tl.constexpr,
    COPIES: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < size
    gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0)
    average = tl.load(average_ptr + place, mask=inside, other=0.0)
    square = tl.load(square_ptr + place, mask=inside, other=0.0)
    parameter = tl.load(parameter_ptr + place, mask=inside, other=0.0)
    gradient *= tl.load(numbers_ptr)
    average = average * tl.load(numbers_ptr + 1) + gradient * tl.load(numbers_ptr + 2)
    square = square * tl.load(numbers_ptr + 3) + gradient * gradient * tl.load(numbers_ptr + 4)
    divisor = tl.sqrt(square) / tl.load(numbers_ptr + 5) + tl.load(numbers_ptr + 6)
    parameter *= tl.load(numbers_ptr + 7)
    parameter -= tl.load(numbers_ptr + 8) * average / divisor
    tl.store(average_ptr + place, average, mask=inside)
    tl.store(square_ptr + place, square, mask=inside)
    tl.store(parameter_ptr + place, parameter, mask=inside)
    if COPIES:
        copy = parameter.to(copy_ptr.dtype.element_ty)
        tl.store(copy_ptr + place, copy, mask=inside)


UPDATE = Tunable(
    "adamw",
    "update",
    (_update,),
    ("size",),
    # seven streams of memory: few bytes of each are enough to keep it busy
    {"elements": 1024, "warps": 4},
    {"elements": (256, 512, 1024, 2048, 4096), "warps": (2, 4, 8)},
)

_launch = Launcher(_update)


def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor | None],
    settings: Settings,
) -> None:
    """Update each tensor in one pass over its memory; tensors must be contiguous."""
    # all numbers are computed on the device, so that the host does not wait
    table = _numbers(torch.stack(steps), settings)
    for row, parameter, gradient, average, square, copy in zip(
        table.unbind(), parameters, gradients, exp_avgs, exp_avg_sqs, copies, strict=True
    ):
        size = parameter.numel()
        launch = UPDATE.at(parameter, size)
        _launch(
            (triton.cdiv(size, launch["elements"]), 1, 1),
            (
                row,
                gradient.contiguous(),
                average,
                square,
                parameter if copy is None else copy,
                parameter,
            ),
            (size,),
            (launch["elements"], int(copy is not None)),
            num_warps=launch["warps"],
        )
    written = [*parameters, *exp_avgs, *exp_avg_sqs, *(c for c in copies if c is not None)]
    torch.autograd.graph.increment_version(written)


def _numbers(steps: Float[Tensor, " n"], settings: Settings) -> Float[Tensor, "n numbers"]:
    """Return what the kernel multiplies by, for each tensor, computed in float64."""
    beta, beta_sq = settings.betas
    decay = 1 - settings.lr * settings.weight_decay
    same = [settings.coefficient, beta, 1 - beta, beta_sq, 1 - beta_sq, 0.0, settings.eps, decay]
    same += [0.0] * (NUMBERS - len(same))
    row = torch.tensor(same, dtype=torch.float64).to(steps.device, non_blocking=True)
    table, steps = row.repeat(steps.shape[0], 1), steps.double()
    table[:, 5] = (1 - beta_sq**steps).sqrt()
    table[:, 8] = settings.lr / (1 - beta**steps)
    return table.float()
