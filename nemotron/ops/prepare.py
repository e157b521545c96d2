"""Compile all kernels for this CPU, so that no run has to: python -m nemotron.ops.prepare."""

import torch

from nemotron.ops.attention import int16 as attention_int16
from nemotron.ops.attention import numba as attention
from nemotron.ops.causal_conv1d import numba as causal_conv1d
from nemotron.ops.grouped_linear import int16 as linear_int16
from nemotron.ops.grouped_linear import numba as grouped_linear
from nemotron.ops.grouped_mlp import int16 as mlp_int16
from nemotron.ops.grouped_mlp import numba as grouped_mlp
from nemotron.ops.jit.call import kernels
from nemotron.ops.linear_cross_entropy import numba as linear_cross_entropy
from nemotron.ops.rms_norm import numba as rms_norm
from nemotron.ops.routing import numba as routing
from nemotron.ops.squared_relu import numba as squared_relu
from nemotron.ops.ssd import numba as ssd
from nemotron.ops.token_step import compiled

MODULES = (
    attention.FLOAT32.module,
    causal_conv1d.MODULE,
    grouped_linear.FLOAT32.module,
    grouped_mlp.FLOAT32.module,
    linear_cross_entropy.MODULE,
    rms_norm.MODULE,
    squared_relu.MODULE,
    ssd.MODULE,
)
OF_FLOAT32 = (routing.MODULE,)
OF_BFLOAT16 = tuple(form.INT16.module for form in (attention_int16, linear_int16, mlp_int16))


def prepare() -> None:
    """Compile what is not kept yet, for float32 and bfloat16."""
    of_float32 = (torch.float32, MODULES + OF_FLOAT32)
    for dtype, modules in (of_float32, (torch.bfloat16, MODULES + OF_BFLOAT16)):
        compiled.kernels(dtype)
        for module in modules:
            kernels(module, dtype)


if __name__ == "__main__":
    prepare()
