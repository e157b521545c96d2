"""Attention whose products are of 16-bit integers, for training in bfloat16 on CPUs."""

import functools
from types import ModuleType
from typing import Any

import torch

from nemotron.ops.attention import numba
from nemotron.ops.attention.numba import Form
from nemotron.ops.jit import int16_matrices
from nemotron.ops.jit.call import scratch
from nemotron.ops.jit.vectors import LANES

_rows_size, _column_size, _part_size, _added_size = (
    function.py_func
    for function in (
        int16_matrices.rows_size,
        int16_matrices.column_size,
        int16_matrices.part_size,
        int16_matrices.added_size,
    )
)


def _forward(found: ModuleType, values: dict[str, Any]) -> dict[str, Any]:
    depth, channels, keys = values["depth"], values["depth"] // LANES, found.KEYS
    blocks = values["sides"] * values["blocks"]
    rows = _rows_size(keys, channels) // 4
    columns = found.COLUMNS // LANES * _column_size(channels) // 4 + found.COLUMNS * (depth + 4)
    reading = keys * depth + rows
    attending = keys * LANES + _part_size(keys) // 4 + columns + LANES * depth
    return {
        "keys": torch.empty(blocks * rows),
        "values": torch.empty(blocks * _added_size(keys, channels) // 4),
    } | scratch(max(reading, attending))


def _backward(found: ModuleType, values: dict[str, Any]) -> dict[str, Any]:
    depth, channels, keys = values["depth"], values["depth"] // LANES, found.KEYS
    strips, columns = found.TOGETHER, found.TOGETHER * LANES
    block = 2 * _rows_size(keys, channels) + _added_size(keys, channels)
    integers = values["segment"] // keys * block + _rows_size(keys, max(strips, channels))
    integers += 2 * _added_size(columns, channels) + 2 * strips * _column_size(channels)
    numbers = 4 * values["segment"] * depth + columns * (2 * keys + depth + 4)
    return scratch(integers // 4 + numbers)


INT16 = Form("nemotron.ops.attention.int16_kernels", _forward, _backward)
"""Blocks of 16-bit integers with a power of two each."""

attention = functools.partial(numba.attention, form=INT16)
