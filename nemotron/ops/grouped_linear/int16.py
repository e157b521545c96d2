"""Products of bfloat16 rows in 16-bit integers, for training on CPUs."""

import functools
from typing import Any

from nemotron.ops.grouped_linear import numba
from nemotron.ops.grouped_linear.numba import Blocks, Form, Sizes, strips_of
from nemotron.ops.jit import int16_matrices
from nemotron.ops.jit.call import workspace
from nemotron.ops.jit.matrices import ROWS

_rows_size, _column_size, _part_size = (
    function.py_func
    for function in (
        int16_matrices.rows_size,
        int16_matrices.column_size,
        int16_matrices.part_size,
    )
)


def rows(columns: int) -> int:
    """Return the float32 numbers that fill the room of a block of rows."""
    return int(_rows_size(ROWS, strips_of(columns))) // 4


def matrices(groups: int, depth: int, columns: int) -> int:
    """Return the same of a stack of matrices [depth, columns], whose columns are added up."""
    return groups * strips_of(columns) * int(_column_size(strips_of(depth))) // 4


def columns(blocks: Blocks, count: int) -> int:
    """Return the same of so many columns of all blocks of rows, which are added up."""
    factors = _part_size(0)
    filled = len(blocks.table) * factors + _part_size(blocks.rows) - factors
    return strips_of(count) * int(filled) // 4


def _forward(sizes: Sizes) -> dict[str, Any]:
    scratch = sizes.inner * ROWS + rows(sizes.inner) + sizes.result
    return workspace(scratch, packed=matrices(sizes.groups, sizes.inner, sizes.outer))


def _backward(sizes: Sizes, blocks: Blocks) -> dict[str, Any]:
    return workspace(
        max(sizes.inner, sizes.outer) * ROWS + rows(sizes.outer) + sizes.result,
        packed=matrices(sizes.groups, sizes.outer, sizes.inner),
        slopes=columns(blocks, sizes.outer),
        rows=columns(blocks, sizes.inner),
    )


INT16 = Form("nemotron.ops.grouped_linear.int16_kernels", _forward, _backward)
"""Blocks of 16-bit integers with a power of two each."""

grouped_linear = functools.partial(numba.grouped_linear, form=INT16)
linear = functools.partial(numba.linear, form=INT16)
