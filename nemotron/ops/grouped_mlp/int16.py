"""Routed experts in 16-bit integers, for training on CPUs."""

import functools
from typing import Any

from nemotron.ops.grouped_linear.int16 import columns, matrices, rows
from nemotron.ops.grouped_linear.numba import Blocks, Form, Sizes
from nemotron.ops.grouped_mlp import numba
from nemotron.ops.jit.call import workspace
from nemotron.ops.jit.matrices import ROWS


def _forward(sizes: Sizes) -> dict[str, Any]:
    wide = max(sizes.inner, sizes.outer)
    return workspace(
        wide * ROWS + rows(wide) + sizes.result,
        ups=matrices(sizes.groups, sizes.inner, sizes.outer),
        downs=matrices(sizes.groups, sizes.outer, sizes.inner),
    )


def _backward(sizes: Sizes, blocks: Blocks) -> dict[str, Any]:
    wide = max(sizes.inner, sizes.outer)
    return workspace(
        2 * wide * ROWS + rows(wide) + sizes.result,
        ups=matrices(sizes.groups, sizes.outer, sizes.inner),
        downs=matrices(sizes.groups, sizes.inner, sizes.outer),
        slopes=columns(blocks, sizes.inner),
        rows=columns(blocks, sizes.inner),
        inside=columns(blocks, sizes.outer),
        activated=columns(blocks, sizes.outer),
    )


INT16 = Form("nemotron.ops.grouped_mlp.int16_kernels", _forward, _backward)
"""Blocks of 16-bit integers with a power of two each."""

grouped_mlp = functools.partial(numba.grouped_mlp, form=INT16)
