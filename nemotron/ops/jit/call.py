"""Calls of compiled kernels: one record of sizes and addresses, done by all threads together."""

import functools
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.jit import storage
from nemotron.ops.jit.native import address_of
from nemotron.ops.jit.team import Team

FORMATS = frozenset({torch.float32, torch.bfloat16})
"""Formats of activations that kernels take."""
COMPILE_S = 8
"""About how long a core compiles an operation's kernels for one dtype."""

_team = Team()
_room = torch.empty(0)


@functools.cache
def kernels(module: str, dtype: torch.dtype) -> ModuleType:
    """Return an operation's kernels, compiled for a dtype or loaded from where they are kept.

    A module of kernels has `CALL`, the record that they take, and `KERNELS`, all of them.
    """
    name = str(dtype).removeprefix("torch.")
    operation = module.removeprefix("nemotron.ops.").removesuffix("kernels").strip("._")
    mark = storage.announce(f"{operation}-{name}", f"kernels of {operation} in {name}", COMPILE_S)
    found = storage.load(module)
    for kernel in found.KERNELS:
        address_of(kernel, dtype)
    mark.touch()
    return found


def run(kernel: Any, record: Any, dtype: torch.dtype, values: dict[str, Any]) -> None:
    """Fill a record with numbers and the addresses of tensors, and run a kernel in every thread."""
    call = np.zeros(1, record)
    for name, value in values.items():
        call[name] = value.data_ptr() if isinstance(value, Tensor) else value
    call["counter"] = _team.counter
    _team.run(address_of(kernel, dtype), call.ctypes.data)


def scratch(numbers: int) -> dict[str, Any]:
    """Return room for so many float32 numbers for each thread, as values of a call."""
    size = -(-numbers // 16) * 16
    room = torch.empty(torch.get_num_threads(), size)
    return {"scratch": room, "scratch_size": size * 4}


def workspace(scratch: int, **numbers: int) -> dict[str, Any]:
    """Return room for so many float32 numbers, which any later call may overwrite: `scratch` for
    each thread, and others by name.

    It is kept: memory that the system gives anew costs more than what small kernels compute.
    """
    global _room
    threads = torch.get_num_threads()
    sizes = [-(-count // 16) * 16 for count in (scratch, *numbers.values())]
    sizes[0] *= threads
    if sum(sizes) > _room.numel():
        _room = torch.empty(sum(sizes))
    first, *others = _room[: sum(sizes)].split(sizes)
    named = dict(zip(numbers, others, strict=True))
    return {"scratch": first, "scratch_size": first.numel() // threads * 4, **named}


def add_up(parts: Float[Tensor, "units *rest"]) -> Float[Tensor, "*rest"]:
    """Return the sum over units in an order that does not depend on the number of threads."""
    total = parts[0].double()
    for part in parts[1:]:
        total += part
    return total.float()
