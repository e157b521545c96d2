"""Selective state-space scan of Mamba-2 (structured state-space duality)."""

from jaxtyping import Float, Int
from torch import Tensor, bfloat16, float32

from nemotron.ops.registry import Backend, Operation, lazy
from nemotron.ops.ssd import chunked, mamba_ssm, reference

TRITON_SIZES = {16, 32, 64, 128}
"""Sizes of heads and states of the Triton kernels: powers of 2 from the smallest of a product."""


def _triton_limit(head_size: int, state_size: int) -> str | None:
    if {head_size, state_size} <= TRITON_SIZES:
        return None
    taken = ", ".join(map(str, sorted(TRITON_SIZES)))
    return f"takes heads and states of {taken}, not of {head_size} and {state_size}"


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


ssd = SSDOp(
    "ssd",
    [
        Backend(
            "triton",
            lazy("nemotron.ops.ssd.triton", "ssd"),
            devices=frozenset({"cuda"}),
            dtypes=frozenset({float32, bfloat16}),
            features=frozenset({"documents", "initial_state", "final_state"}),
            packages=("triton",),
            install="comes with torch for CUDA",
            imports=("nemotron.ops.ssd.triton",),
            limit=_triton_limit,
        ),
        mamba_ssm.backend,
        chunked.backend,
        reference.backend,
    ],
)
