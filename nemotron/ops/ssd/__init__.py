"""Selective state-space scan of Mamba-2 (structured state-space duality)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend, Operation, numba_backend, triton_backend
from nemotron.ops.ssd import chunked, mamba_ssm

TRITON_SIZES = {16, 32, 64, 128}
"""Sizes of heads and states of the Triton kernels: powers of 2 from the smallest of a product."""


def _triton_limit(head_size: int, state_size: int) -> str | None:
    if {head_size, state_size} <= TRITON_SIZES:
        return None
    taken = ", ".join(map(str, sorted(TRITON_SIZES)))
    return f"takes heads and states of {taken}, not of {head_size} and {state_size}"


def _numba_limit(head_size: int, state_size: int) -> str | None:
    if head_size % 16 == 0 and state_size % 16 == 0:
        return None
    return f"takes heads and states of multiples of 16, not of {head_size} and {state_size}"


class SSDOp(Operation):
    """Run the recurrence S_t = exp(dt_t A) S_{t-1} + dt_t x_t ⊗ B_t, y_t = S_t C_t + D x_t.

    `dt` is positive and float32, `A` negative. With `seq_idx` the state is zero before the first
    token of each document; `initial_state` belongs to document 0. Returns y in the dtype of `x`,
    and the float32 state after the last token when asked for.
    """

    def __call__(
        self,
        x: Float[Tensor, "B T H P"],
        dt: Float[Tensor, "B T H"],
        A: Float[Tensor, " H"],
        B: Float[Tensor, "B T G N"],
        C: Float[Tensor, "B T G N"],
        D: Float[Tensor, " H"],
        *,
        initial_state: Float[Tensor, "B H P N"] | None = None,
        seq_idx: Int[Tensor, "B T"] | None = None,
        return_final_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        function = self.select(
            x,
            sizes=(x.shape[3], B.shape[3]),
            documents=seq_idx is not None,
            initial_state=initial_state is not None,
            final_state=return_final_state,
        )
        y, final_state = function(x, dt, A, B, C, D, initial_state, seq_idx)
        return (y, final_state) if return_final_state else y


def reference(
    x: Float[Tensor, "B T H P"],
    dt: Float[Tensor, "B T H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B T G N"],
    C: Float[Tensor, "B T G N"],
    D: Float[Tensor, " H"],
    initial_state: Float[Tensor, "B H P N"] | None,
    seq_idx: Int[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B H P N"]]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t ⊗ B_t; y_t = S_t C_t + D x_t (Dao & Gu 2024, eq. 1)."""
    repeat = x.shape[2] // B.shape[2]
    wide_x = x.to(dt.dtype)
    B, C = (t.to(dt.dtype).repeat_interleave(repeat, dim=2) for t in (B, C))
    state = initial_state
    if state is None:
        state = dt.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    document = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None:
            same = torch.eq(seq_idx[:, t], document)
            state = state * same[:, None, None, None]
            document = seq_idx[:, t]
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        update = (dt[:, t, :, None] * wide_x[:, t])[..., None] * B[:, t, :, None]
        state = decay * state + update
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * wide_x[:, t])
    return torch.stack(outputs, dim=1).to(x.dtype), state


ssd = SSDOp(
    "ssd",
    [
        triton_backend(
            "nemotron.ops.ssd.triton",
            "ssd",
            features=frozenset({"documents", "initial_state", "final_state"}),
            limit=_triton_limit,
        ),
        mamba_ssm.backend,
        numba_backend(
            "nemotron.ops.ssd.numba",
            "ssd",
            features=frozenset({"documents", "initial_state", "final_state"}),
            limit=_numba_limit,
        ),
        chunked.float32_backend,
        chunked.backend,
        Backend(
            "reference",
            reference,
            features=frozenset({"documents", "initial_state", "final_state"}),
        ),
    ],
)
