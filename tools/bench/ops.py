"""Time every operation, forward and backward, beside its reference and its speed of light.

python tools/bench/ops.py [--op NAME ...] [--dtype fp32|bf16 ...] [--json]

The speed of light is the longer of arithmetic at the machine's own matmul peak and of moving each
input, output and gradient once at its copy bandwidth, both measured in the same run. The score
1 / (1 + (T - T_sol) / (T_ref - T_sol)) is 0.5 for the readable reference and 1 at the limit (as
NVIDIA/SOL-ExecBench: sol_score.py). Inputs are fresh in every repetition and caches are flushed;
results are compared with the reference in float64 before and after.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from cases import DTYPES
from machine import Watch, copy_bandwidth, matmul_peak
from torch import Tensor

from nemotron.ops import (
    attention,
    causal_conv1d,
    grouped_linear,
    linear_cross_entropy,
    rms_norm,
    ssd,
)
from nemotron.ops.registry import Call, Operation

TOKENS, HIDDEN, VOCAB = 2048, 256, 4096
HEADS, HEAD_DIM, GROUPS, STATE = 16, 32, 4, 64
EXPERTS, TOP_K, EXPERT_WIDTH = 16, 4, 256
EPS = 1e-5

KEPT, KEPT_SLOW = 7, 2
SLOW = 2.0
"""Seconds from which fewer repetitions must do."""
TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2}
"""Largest difference from the float64 reference, relative to the largest entry."""

Function = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Workload:
    """An operation at the size of one layer of the benchmark's models, 2048 tokens.

    `draw` makes the tensors, `rest` the other arguments; `flops` counts the products of a forward
    pass, twice as many again go into the gradients.
    """

    operation: Operation
    draw: Callable[[torch.Generator], list[Tensor]]
    rest: tuple[object, ...]
    flops: float
    wide: tuple[int, ...] = ()
    """Tensors that stay float32, by position."""

    @property
    def name(self) -> str:
        return self.operation.name

    def inputs(self, seed: int, dtype: torch.dtype) -> list[Tensor]:
        """Draw inputs; integer tensors and those in `wide` keep their dtype (float64 converts)."""
        tensors = []
        for position, tensor in enumerate(self.draw(torch.Generator().manual_seed(seed))):
            if tensor.is_floating_point():
                narrow = position not in self.wide or dtype == torch.float64
                tensor = tensor.to(dtype) if narrow else tensor
                tensor.requires_grad_()
            tensors.append(tensor)
        return tensors


def _normal(*sizes: tuple[int, ...]) -> Callable[[torch.Generator], list[Tensor]]:
    return lambda generator: [torch.randn(size, generator=generator) for size in sizes]


def _draw_scan(generator: torch.Generator) -> list[Tensor]:
    x, B, C, D = _normal(
        (1, TOKENS, HEADS, HEAD_DIM),
        (1, TOKENS, GROUPS, STATE),
        (1, TOKENS, GROUPS, STATE),
        (HEADS,),
    )(generator)
    dt = torch.rand(1, TOKENS, HEADS, generator=generator) * 0.1
    A = -1 - 15 * torch.rand(HEADS, generator=generator)
    return [x, dt, A, B, C, D]


def _draw_groups(generator: torch.Generator) -> list[Tensor]:
    rows = TOKENS * TOP_K
    x, weight = _normal((rows, HIDDEN), (EXPERTS, EXPERT_WIDTH, HIDDEN))(generator)
    return [x, weight, torch.full((EXPERTS,), rows // EXPERTS)]


def _draw_head(generator: torch.Generator) -> list[Tensor]:
    hidden, weight = _normal((TOKENS, HIDDEN), (VOCAB, HIDDEN))(generator)
    return [hidden, weight * 0.02, torch.randint(VOCAB, (TOKENS,), generator=generator)]


INNER = HEADS * HEAD_DIM
CHANNELS = INNER + 2 * GROUPS * STATE
QKV = [(1, TOKENS, heads, HEAD_DIM) for heads in (8, 2, 2)]

WORKLOADS = [
    # the recurrence itself: one update of and one product with a P x N state per head and token
    Workload(ssd.ssd, _draw_scan, (None, None), 4.0 * TOKENS * INNER * STATE, wide=(1, 2, 5)),
    Workload(
        causal_conv1d.causal_conv1d,
        _normal((1, TOKENS, CHANNELS), (CHANNELS, 4), (CHANNELS,)),
        (None, None, True),
        2.0 * TOKENS * CHANNELS * 4,
    ),
    # two products over the causal half
    Workload(attention.attention, _normal(*QKV), (None, None), 2.0 * TOKENS**2 * 8 * HEAD_DIM),
    Workload(
        grouped_linear.grouped_linear,
        _draw_groups,
        (),
        2.0 * TOKENS * TOP_K * HIDDEN * EXPERT_WIDTH,
    ),
    Workload(
        linear_cross_entropy.linear_cross_entropy,
        _draw_head,
        ("sum",),
        2.0 * TOKENS * HIDDEN * VOCAB,
    ),
    Workload(rms_norm.rms_norm, _normal((TOKENS, HIDDEN), (HIDDEN,)), (EPS,), 0.0, wide=(1,)),
    Workload(
        rms_norm.gated_rms_norm,
        _normal((TOKENS, INNER), (TOKENS, INNER), (INNER,)),
        (GROUPS, EPS),
        0.0,
        wide=(2,),
    ),
]


def results(
    function: Function, workload: Workload, inputs: list[Tensor], cotangent: Tensor
) -> list[Tensor]:
    """Return the output and the gradient of every floating input."""
    y = function(*inputs, *workload.rest)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(cotangent.to(y.dtype))
    return [y.detach(), *(t.grad for t in inputs if t.grad is not None)]


@cache
def cotangent(workload: Workload) -> Tensor:
    """Draw a gradient for the output."""
    with torch.no_grad():
        y = workload.operation.backend("reference").function(
            *workload.inputs(0, torch.float32), *workload.rest
        )
    y = y[0] if isinstance(y, tuple) else y
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(0))


def difference(function: Function, workload: Workload, dtype: str, seed: int) -> float:
    """Return the largest difference from the reference in float64, relative per tensor."""
    inputs, dy = workload.inputs(seed, DTYPES[dtype]), cotangent(workload)
    exact = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    exact = [t.requires_grad_() if t.is_floating_point() else t for t in exact]
    reference = workload.operation.backend("reference").function
    # both are given the same numbers, rounded to the dtype that is tested
    dy = dy.to(DTYPES[dtype])
    found = results(function, workload, inputs, dy)
    pairs = zip(found, results(reference, workload, exact, dy), strict=True)
    return max(float((ours - true).abs().max() / true.abs().max()) for ours, true in pairs)


def repetitions(function: Function, workload: Workload, dtype: str) -> Iterator[Watch]:
    """Time forward and backward again and again, on fresh inputs and with cold caches."""
    flush, dy = torch.empty(1 << 24), cotangent(workload).to(DTYPES[dtype])
    seed = 0
    while True:
        seed += 1
        inputs = workload.inputs(seed, DTYPES[dtype])
        flush.fill_(seed)
        with Watch() as watch:
            results(function, workload, inputs, dy)
        yield watch


def median_seconds(
    functions: dict[str, Function], workload: Workload, dtype: str, options: argparse.Namespace
) -> dict[str, float]:
    """Let the implementations take turns until each has enough undisturbed repetitions."""
    runs = {name: repetitions(function, workload, dtype) for name, function in functions.items()}
    kept: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        next(run), next(run)
    end = time.monotonic() + options.patience
    while True:
        for name, run in runs.items():
            needed = KEPT_SLOW if kept[name] and kept[name][0] > SLOW else KEPT
            if len(kept[name]) < needed:
                watch = next(run)
                if watch.others <= options.max_others:
                    kept[name].append(watch.seconds)
        if all(len(k) >= (KEPT_SLOW if k and k[0] > SLOW else KEPT) for k in kept.values()):
            return {name: statistics.median(seconds) for name, seconds in kept.items()}
        if time.monotonic() > end:
            raise SystemExit(f"{workload.name}: no quiet moment in {options.patience:.0f} s")


def compulsory_bytes(workload: Workload, dtype: str) -> int:
    """Count what must be moved: inputs twice, output, its gradient and the inputs' gradients."""
    inputs = workload.inputs(0, DTYPES[dtype])
    reference = workload.operation.backend("reference").function
    y, *gradients = results(reference, workload, inputs, cotangent(workload))
    return sum(t.nbytes for t in (*inputs, *inputs, y, y, *gradients))


def measure(
    workload: Workload, dtype: str, peak: float, bandwidth: float, options: argparse.Namespace
) -> dict[str, object]:
    """Check and time one operation in one dtype."""
    chosen = workload.operation.choose(Call("cpu", DTYPES[dtype]))
    functions = {
        "ours": chosen.function,
        "reference": workload.operation.backend("reference").function,
    }
    before = {name: difference(f, workload, dtype, seed=0) for name, f in functions.items()}
    seconds = median_seconds(functions, workload, dtype, options)
    after = difference(functions["ours"], workload, dtype, seed=1)
    if (worst := max(*before.values(), after)) > TOLERANCE[dtype]:
        raise SystemExit(f"{workload.name} {dtype}: results differ by {worst:.1e}, no figure")
    light = max(3 * workload.flops / peak, compulsory_bytes(workload, dtype) / bandwidth)
    if seconds["ours"] < light:
        raise SystemExit(f"{workload.name} {dtype}: faster than light, the formula is wrong")
    score = 1 / (1 + (seconds["ours"] - light) / max(seconds["reference"] - light, 1e-12))
    return {
        "op": workload.name,
        "dtype": dtype,
        "backend": chosen.name,
        "difference": max(before["ours"], after),
        "seconds": seconds,
        "light": light,
        "score": score,
    }


def main() -> int:
    """Measure the chosen operations."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--op", action="append", choices=names, help="only this one (repeatable)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this one")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each")
    parser.add_argument("--patience", type=float, default=300, help="seconds to wait for quiet")
    parser.add_argument("--max-others", type=float, default=0.10, help="as in models.py")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    for dtype in options.dtype or DTYPES:
        peak, _ = matmul_peak(DTYPES[dtype])
        for workload in WORKLOADS:
            if options.op and workload.name not in options.op:
                continue
            row = measure(workload, dtype, peak, bandwidth, options)
            if options.json:
                print(json.dumps(row), flush=True)
                continue
            times = ", ".join(f"{name} {t * 1e3:.3g}" for name, t in row["seconds"].items())
            print(
                f"{row['op']:21s} {dtype} {row['backend']:10s} {times}, "
                f"light {row['light'] * 1e3:.3g} ms, score {row['score']:.2f}, "
                f"difference {row['difference']:.1e}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
