"""The fused Triton kernels of mamba-ssm."""

from jaxtyping import Float, Int
from torch import Tensor, bfloat16

from nemotron.ops.registry import Backend

CHUNK = 128
"""Tokens in a chunk, as the released models' `chunk_size`; the result does not depend on it."""


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
    """Scan in one fused kernel per pass; `initial_state` belongs to document 0 there as well."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, final_state = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        CHUNK,
        D=D,
        initial_states=initial_state,
        seq_idx=seq_idx,
        return_final_states=True,
    )
    return y, final_state.float()


backend = Backend(
    "mamba_ssm",
    ssd,
    devices=frozenset({"cuda"}),
    # in float32 its products are rounded to TF32
    dtypes=frozenset({bfloat16}),
    features=frozenset({"documents", "initial_state", "final_state"}),
    packages=("mamba_ssm",),
    install="pip install 'mamba-ssm>=2.3' --no-build-isolation",
    # an installation whose other kernels were not compiled is found and cannot be imported
    imports=("mamba_ssm.ops.triton.ssd_combined",),
)
