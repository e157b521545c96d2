"""The device that a process computes on: which one, its memory, its cache, how fast it is."""

import functools
import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron.errors import UserError

GIB = float(1 << 30)

MEASURED_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices whose product measures a device."""

CACHED_ELEMENTS = 1 << 17
"""Elements of which the float32 intermediates are about the cache of a CPU's core."""


def find_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device of that name; `auto` is the GPU when there is one.

    Of several processes on a machine, each takes the GPU of its local rank.

    Raises:
        UserError: when there is no such device here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return torch.device(name)
    if name == "cuda" and count and local_rank is not None:
        if local_rank >= count:
            raise UserError(
                f"local rank {local_rank} has no GPU: there are {count} here; start one "
                "process for each."
            )
        torch.cuda.set_device(local_rank)
        return torch.device(name, local_rank)
    if kind == "cuda" and count and (not index or (index.isdigit() and int(index) < count)):
        return torch.device(name)
    known = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    why = "" if count else " (`nemotron doctor` says why there is no GPU)"
    rule = f"is not on this machine; use {', '.join(known)}{why}."
    raise UserError(rule, key="device", value=name)


def host_memory() -> int:
    """Return the bytes of this machine's main memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_values(device: torch.device) -> dict[str, float]:
    """Return resident memory now and at its peak, and the peak on the GPU, in GiB."""
    # Linux counts the peak in KiB
    values = {"mem/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    own = Path("/proc/self/statm")
    if own.exists():
        pages = int(own.read_text().split()[1])
        values["mem/rss_gib"] = pages * resource.getpagesize() / GIB
    if device.type == "cuda":
        values["mem/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return values


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Say whether this CPU has instructions for products of bfloat16."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def measure_matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the FLOP/s of large matrix products in `dtype`: the fastest, on random numbers.

    Other programs only slow a product down, so the fastest is nearest to what the device can do. A
    GPU multiplies constant matrices up to 13 % faster, since their bits hardly toggle. bfloat16 is
    float32 on a CPU without instructions for it, as in `ops.float32_products`.
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and not cpu_multiplies_bfloat16():
        dtype = torch.float32
    size = MEASURED_SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)  # the first product sets up the library
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)


@functools.cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of `measure_matmul_peak`, which a process measures once."""
    return measure_matmul_peak(device, dtype)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Mark = Any
"""A point in the work of a device, as `mark` makes it: an event of a GPU, or a time in seconds."""


def mark(device: torch.device) -> Mark:
    """Mark this point of the work that was asked for; the host does not wait for a GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(marks: Sequence[Mark]) -> list[float]:
    """Return the device's seconds between neighboring marks; waits for the last one."""
    if marks and isinstance(marks[0], torch.cuda.Event):
        marks[-1].synchronize()
        return [first.elapsed_time(second) / 1e3 for first, second in pairwise(marks)]
    return [second - first for first, second in pairwise(marks)]


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of all tensors [M, ...], as many at a time as a CPU's core can cache.

    On a GPU one block is all of them.
    """
    rows = max(1, tensors[0].shape[0])
    width = max(1, tensors[0].numel() // rows)
    height = max(1, CACHED_ELEMENTS // width) if tensors[0].device.type == "cpu" else rows
    return zip(*(tensor.split(height) for tensor in tensors), strict=True)
