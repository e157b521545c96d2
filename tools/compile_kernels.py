"""Compile Triton kernels for a GPU that is not here: compile_kernels.py [CASE ...] [--arch 90].

Each case calls an operation on meta tensors, at the sizes of Nano or Super, forward and, where the
operation trains, backward. Launches are compiled instead of run, so what is compiled is what the
operation would launch. The table shows registers, stack (spilled registers lie there), shared
memory, and how many matrix instructions of Hopper (HGMMA) stand where the kernel multiplies. Exit
code 1: a kernel spills, asks for more shared memory than a block can have, or multiplies bfloat16
without HGMMA.
"""

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ParamSpec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when a kernel is defined

import torch
import triton
from torch import Tensor

from nemotron.ops.adamw import Settings
from nemotron.ops.adamw.triton import adamw
from nemotron.ops.causal_conv1d.triton import causal_conv1d
from nemotron.ops.grouped_linear.triton import grouped_linear, grouped_mlp
from nemotron.ops.linear_cross_entropy.triton import linear_cross_entropy
from nemotron.ops.rms_norm.gated_triton import gated_rms_norm
from nemotron.ops.rms_norm.triton import rms_norm
from nemotron.ops.routing.balance_triton import balance_sums
from nemotron.ops.routing.copies_triton import token_copies
from nemotron.ops.routing.order_triton import expert_order
from nemotron.ops.routing.topk_triton import topk_routing
from nemotron.ops.squared_relu.triton import squared_relu
from nemotron.ops.ssd.triton import ssd
from nemotron.ops.tuning import base
from nemotron.sol.sizes import SIZES, Size
from nemotron.tune.compiled import SHARED_LIMIT, launches_replaced, pretend, used

P = ParamSpec("P")
BF16, FP32 = torch.bfloat16, torch.float32
TOKENS = 8192
ROWS = 8
"""Texts that a step of generation continues."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    case: str
    kernel: str
    options: str
    registers: int
    stack: int
    shared: int
    dots: int
    hgmma: int

    def faults(self) -> list[str]:
        found = []
        if self.stack:
            found.append(f"spills {self.stack} bytes")
        if self.shared > SHARED_LIMIT:
            found.append(f"asks for {self.shared} bytes of shared memory")
        if self.dots and not self.hgmma and "bf16" in self.case:
            found.append("multiplies without HGMMA")
        return found


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Return a tensor without memory that wants a gradient where it can have one."""
    return torch.empty(shape, device="meta", dtype=dtype).requires_grad_(dtype.is_floating_point)


def call(
    function: Callable[P, Tensor | tuple[Tensor, ...]], *given: P.args, **named: P.kwargs
) -> None:
    """Run an operation's Triton form, forward and backward."""
    result = function(*given, **named)
    outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if t.requires_grad]
    torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])


def scan(sizes: Size, dtype: torch.dtype, *, documents: bool) -> None:
    mixed = empty(2, TOKENS // 2, sizes.channels, dtype=dtype)
    bc = sizes.groups * sizes.state
    x, B, C = mixed.split([sizes.inner, bc, bc], dim=-1)
    shape = (sizes.groups, sizes.state)
    ids = empty(2, TOKENS // 2, dtype=torch.int32) if documents else None
    initial = empty(2, sizes.heads, sizes.head_dim, sizes.state) if documents else None
    call(
        ssd,
        x.unflatten(-1, (sizes.heads, sizes.head_dim)),
        empty(2, TOKENS // 2, sizes.heads),
        empty(sizes.heads),
        B.unflatten(-1, shape),
        C.unflatten(-1, shape),
        empty(sizes.heads),
        initial,
        ids,
    )


def convolution(sizes: Size, dtype: torch.dtype, *, documents: bool) -> None:
    projected = empty(2, TOKENS // 2, sizes.inner + sizes.channels + sizes.heads, dtype=dtype)
    x = projected[..., sizes.inner : sizes.inner + sizes.channels]
    ids = empty(2, TOKENS // 2, dtype=torch.int32) if documents else None
    state = empty(2, 3, sizes.channels, dtype=dtype) if documents else None
    weight, bias = empty(sizes.channels, 4), empty(sizes.channels)
    call(causal_conv1d, x, weight, bias, state, ids, True)


def norms(sizes: Size, dtype: torch.dtype) -> None:
    x, weight = empty(2, TOKENS // 2, sizes.hidden, dtype=dtype), empty(sizes.hidden)
    call(rms_norm, x, weight, 1e-5)


def gated_norms(sizes: Size, dtype: torch.dtype) -> None:
    y = empty(2, TOKENS // 2, sizes.inner, dtype=dtype)
    projected = empty(2, TOKENS // 2, sizes.inner + sizes.channels, dtype=dtype)
    z = projected[..., : sizes.inner]
    call(gated_rms_norm, y, z, empty(sizes.inner), sizes.groups, 1e-5)


def activation(sizes: Size, dtype: torch.dtype) -> None:
    x = empty(TOKENS * sizes.copies, sizes.expert_width, dtype=dtype)
    call(squared_relu, x, empty(TOKENS * sizes.copies, 1))
    call(squared_relu, empty(TOKENS, sizes.shared_width, dtype=dtype), None)


def experts(sizes: Size, dtype: torch.dtype) -> None:
    held, rows = sizes.experts, TOKENS * sizes.copies
    up = empty(held, sizes.expert_width, sizes.expert_input)
    down = empty(held, sizes.expert_input, sizes.expert_width)
    x, counts = empty(rows, sizes.expert_input, dtype=dtype), empty(held, dtype=torch.int64)
    call(grouped_mlp, x, empty(rows, 1), up, down, counts)
    call(grouped_linear, x, up, counts)


def copies(sizes: Size, dtype: torch.dtype) -> None:
    x, rows = (empty(n, sizes.expert_input, dtype=dtype) for n in (TOKENS, TOKENS * sizes.copies))
    token, place = (empty(TOKENS * sizes.copies, dtype=torch.int64) for _ in range(2))
    starts = empty(TOKENS, dtype=torch.int64)
    call(token_copies, x, token, place, starts, "copy")
    call(token_copies, rows, token, place, starts, "add")


def routing(sizes: Size, dtype: torch.dtype) -> None:
    logits, bias = empty(TOKENS, sizes.all_experts, dtype=dtype), empty(sizes.all_experts).detach()
    given = empty(TOKENS, sizes.copies, dtype=torch.int64)
    for experts in (None, given):
        rule = sizes.copies, 1, 1, True, 2.5
        call(topk_routing, logits, bias, experts, *rule)
    scores = empty(TOKENS, sizes.all_experts)
    for padding in (None, empty(2, TOKENS // 2, dtype=torch.bool)):
        call(balance_sums, scores, padding, 2, sizes.copies)
    weights, counts = empty(TOKENS * sizes.copies), empty(sizes.all_experts, dtype=torch.int64)
    chosen, token = (empty(TOKENS * sizes.copies, dtype=torch.int64) for _ in range(2))
    call(expert_order, weights, chosen, token, counts, TOKENS, 1)


def mamba_step(sizes: Size, dtype: torch.dtype) -> None:
    from nemotron.ops.mamba_step import Weights
    from nemotron.ops.mamba_step.triton import mamba_step

    ends = sizes.inner + sizes.channels
    projected = torch.empty(ROWS, ends + sizes.heads, device="meta", dtype=dtype)
    dt_bias, A_log, D = (torch.empty(sizes.heads, device="meta") for _ in range(3))
    conv = empty(sizes.channels, 4), empty(sizes.channels)
    mamba_step(
        projected[:, sizes.inner : ends],
        projected[:, ends:],
        torch.empty(ROWS, 3, sizes.channels, device="meta", dtype=dtype),
        torch.empty(ROWS, sizes.heads, sizes.head_dim, sizes.state, device="meta"),
        torch.empty(ROWS, device="meta", dtype=torch.int64),
        Weights(*conv, dt_bias, A_log, D, (0.0, math.inf)),
    )


def expert_step(sizes: Size, dtype: torch.dtype) -> None:
    from nemotron.ops.expert_step.triton import expert_step

    up = torch.empty(
        sizes.all_experts, sizes.expert_width, sizes.expert_input, device="meta", dtype=dtype
    )
    for tokens in (1, 8, 23 if sizes.name == "super" else 32):
        chosen = torch.empty(tokens, sizes.copies, device="meta", dtype=torch.int64)
        x = torch.empty(tokens, sizes.expert_input, device="meta", dtype=dtype)
        down = up.view(sizes.all_experts, sizes.expert_input, sizes.expert_width)
        expert_step(x, chosen, chosen.float(), up, down, x)


def router_step(sizes: Size, dtype: torch.dtype) -> None:
    from nemotron.ops.router_step.triton import router_step

    x = torch.empty(ROWS, sizes.hidden, device="meta", dtype=dtype)
    weight = torch.empty(sizes.all_experts, sizes.hidden, device="meta")
    bias = torch.empty(sizes.all_experts, device="meta")
    router_step(x, weight, bias, sizes.copies, 2.5, True)


def cross_entropy(sizes: Size, dtype: torch.dtype) -> None:
    hidden, weight = empty(TOKENS, sizes.hidden, dtype=dtype), empty(sizes.vocab, sizes.hidden)
    labels = empty(TOKENS, dtype=torch.int64)
    call(linear_cross_entropy, hidden, weight, labels, "sum", None)
    call(linear_cross_entropy, hidden, weight, labels, "none", None)


def optimizer(sizes: Size, dtype: torch.dtype) -> None:
    settings = Settings(1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0)
    shape, step = (sizes.expert_width, sizes.expert_input), empty()
    weights, gradients, averages, squares = ([empty(*shape).detach()] for _ in range(4))
    state = weights, gradients, averages, squares, [step]
    adamw(*state, [empty(*shape, dtype=dtype).detach()], settings)
    adamw(*state, [None], settings)


FUNCTIONS: dict[str, Callable[[Size, torch.dtype], None]] = {
    "ssd": functools.partial(scan, documents=False),
    "ssd-documents": functools.partial(scan, documents=True),
    "conv": functools.partial(convolution, documents=False),
    "conv-documents": functools.partial(convolution, documents=True),
    "rms_norm": norms,
    "gated_rms_norm": gated_norms,
    "squared_relu": activation,
    "copies": copies,
    "grouped_mlp": experts,
    "mamba_step": mamba_step,
    "expert_step": expert_step,
    "router_step": router_step,
    "routing": routing,
    "cross_entropy": cross_entropy,
    "adamw": optimizer,
}
CASES: dict[str, Callable[[], None]] = {
    f"{name}-{size}-{str(dtype).removeprefix('torch.').replace('bfloat', 'bf')}": functools.partial(
        function, sizes, dtype
    )
    for name, function in FUNCTIONS.items()
    for size, sizes in ((name, SIZES[name]) for name in ("nano", "super"))
    for dtype in (BF16, FP32)
}


def compile_case(name: str, arch: int) -> list[Compiled]:
    """Run a case with launches that only compile; returns one entry a launch."""
    pretend(arch)
    found: dict[str, Compiled] = {}

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        kernel = launch(self, *arguments, grid=grid, warmup=True, **keywords)
        entry = read(name, self.fn.__name__, kernel)
        found[f"{entry.kernel} {kernel.hash}"] = entry
        return kernel

    # with the launch parameters of the tuning base that is shipped
    with launches_replaced(compile_only) as launch, base.assume(f"sm{arch}"):
        CASES[name]()
    return list(found.values())


def read(case: str, name: str, kernel: Any) -> Compiled:
    """Read registers, memory and instructions off a compiled kernel."""
    registers, stack, shared = used(kernel)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Compiled(
        case,
        name,
        f"{kernel.metadata.num_warps} warps, {kernel.metadata.num_stages} stages",
        registers,
        stack,
        shared,
        kernel.asm["ttir"].count("tt.dot "),
        len(re.findall(r"\bHGMMA\b", code)),
    )


def results(names: list[str], arch: int, processes: int) -> Iterator[Compiled]:
    """Compile cases in several processes, since the driver and the launcher are replaced there."""
    with ProcessPoolExecutor(processes) as pool:
        for entries in pool.map(functools.partial(compile_case, arch=arch), names):
            yield from entries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="all whose name begins so (default: every case)")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one line of JSON a launch")
    asked = parser.parse_args()
    names = [n for n in CASES if not asked.cases or any(n.startswith(c) for c in asked.cases)]
    if not names:
        parser.error(f"no case begins with {asked.cases}; there are {', '.join(CASES)}")
    bad = 0
    for entry in results(names, asked.arch, asked.processes):
        faults = entry.faults()
        bad += bool(faults)
        if asked.json:
            print(json.dumps(asdict(entry) | {"faults": faults}), flush=True)
            continue
        print(
            f"{entry.case:28s} {entry.kernel:28s} {entry.options:20s}"
            f" {entry.registers:3d} registers {entry.stack:5d} stack"
            f" {entry.shared:6d} shared {entry.hgmma:3d} HGMMA"
            f"  {'; '.join(faults)}",
            flush=True,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
