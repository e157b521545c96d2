"""Stage 5: every operation, every backend that is fit: time, share of the floor, score, error.

Problems, bounds and the score are those of nemotron/sol; here 0.5 is the time of torch alone. A
process of its own runs the cases; where one dies or hangs, another goes on after it. `--once` only
runs everything, which fills Triton's cache.
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mamba_kernels import keep_part, shorten_search
from stage import Stage, append, one_line, parser
from torch import Tensor

from nemotron.ops.apply import ALL
from nemotron.ops.registry import Backend, Call, Operation
from nemotron.sol.bound import bound, compulsory, score
from nemotron.sol.clock import repeat
from nemotron.sol.problems import Problem, Source, problems
from nemotron.sol.sizes import SIZES, Size
from nemotron.sol.worker import call

REFERENCE_ONLY = {"ssd", "attention", "linear_cross_entropy"}
"""Operations whose reference loops over tokens or holds far too much at full size."""
HANGS_AFTER = 75.0
"""Seconds without a sign of life after which the process is ended."""
TOLERANCE = 2e-2
"""Largest error in norm, relative, of bf16 results against float32."""
SETS = 2


@dataclass(frozen=True)
class Case:
    """One backend on one problem."""

    size: Size
    problem: Problem
    check: Problem
    operation: Operation
    backend: Backend

    @property
    def name(self) -> str:
        """Operation, what of it, and size."""
        return f"{self.problem.name} {self.size.name}"


def main() -> None:
    options = _options()
    if options.start is not None or options.once:
        _work(Stage("ops", options))
        return
    end = time.monotonic() + options.seconds
    start: int | None = 0
    while start is not None and time.monotonic() < end:
        start = _supervise(options, start, end)


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--only", action="append", help="operation (repeatable; default: all)")
    options.add_argument(
        "--size", action="append", choices=["nano", "super", "tiny"], help="default: both"
    )
    options.add_argument("--once", action="store_true", help="run all once, time nothing")
    options.add_argument("--part", default="0/1", help="of mamba-ssm's configurations, with --once")
    options.add_argument("--start", type=int, help="first case, of the worker's own process")
    return options.parse_args()


def _supervise(options: argparse.Namespace, start: int, end: float) -> int | None:
    """Let a process work; return the case to go on with, or None when there is none."""
    progress: Path = options.out / "ops.progress"
    progress.parent.mkdir(parents=True, exist_ok=True)
    progress.write_text(f"{start} start")
    seconds = max(5.0, end - time.monotonic())
    words = [*sys.argv[1:], "--start", str(start), "--seconds", f"{seconds:.0f}"]
    process = subprocess.Popen([sys.executable, __file__, *words])
    why = "died"
    while process.poll() is None:
        time.sleep(0.2)
        if time.monotonic() > end + 20:
            process.kill()
            return None
        if time.time() - progress.stat().st_mtime > HANGS_AFTER:
            why = f"gave no sign of life for {HANGS_AFTER:.0f} s"
            process.kill()
            process.wait()
    if process.returncode == 0:
        return None
    number, _, name = progress.read_text().partition(" ")
    if name == "start":
        append(options.out, "ops", "worker", error=f"{why} before the first case")
        return None
    append(options.out, "ops", name, error=f"the process {why} ({process.returncode})")
    return int(number) + 1


def _work(stage: Stage) -> None:
    shorten_search((stage.out / "ops.progress").touch)
    keep_part(stage.options.part)
    cases = find_cases(stage)
    torch_times: dict[tuple[str, str], float] = {
        (row["case"], "torch"): row["ms"] for row in _earlier(stage) if row.get("is_torch")
    }
    for number, case in enumerate(cases):
        if number < (stage.options.start or 0):
            continue
        name = f"{case.name}: {case.backend.name}"
        if not stage.options.once:
            (stage.out / "ops.progress").write_text(f"{number} {name}")
        if stage.left() < 2:
            stage.emit(name, skipped=f"no time left, {len(cases) - number} cases not run")
            return
        with stage.attempt(name):
            if stage.options.once:
                _run_once(stage, case)
            else:
                _measure(stage, case, name, torch_times)


def _earlier(stage: Stage) -> list[dict[str, Any]]:
    from stage import read

    return [row for row in read(stage.out) if row["stage"] == "ops"]


def find_cases(stage: Stage) -> list[Case]:
    """Return what runs: for each problem first torch's backend, then the others that are fit."""
    options = stage.options
    names = options.size or (["tiny"] if stage.tiny else ["nano", "super"])
    operations = {operation.name: operation for operation in ALL}
    cases, unknown = [], set()
    for name in names:
        size = SIZES[name]
        pairs = zip(problems(size, size.usual), problems(size, size.checked), strict=True)
        for problem, check in pairs:
            operation = operations.get(problem.operation)
            if operation is None:
                unknown.add(problem.operation)
            elif not options.only or operation.name in options.only:
                backends = fit(operation, problem, stage.device, stage.tiny)
                if not options.part.startswith("0/"):
                    backends = [b for b in backends if "mamba_ssm" in b.packages]
                cases += [Case(size, problem, check, operation, b) for b in backends]
    if not options.once and not options.start:
        tiny = SIZES["tiny"]
        covered = {problem.operation for problem in problems(tiny, tiny.checked)}
        without = sorted(operations.keys() - covered)
        stage.emit("coverage", absent=sorted(unknown), without_problem=without)
    return cases


def fit(operation: Operation, problem: Problem, device: torch.device, tiny: bool) -> list[Backend]:
    """Return the backends to time: torch's own first; the reference only where it is that."""
    call = Call(device.type, torch.bfloat16, problem.needs)
    found = [b for b in operation.backends if b.unfit(call) is None]
    if tiny:
        # in Triton's interpreter kernels take tensors of a CPU
        on_gpu = Call("cuda", torch.bfloat16, problem.needs)
        mine = [b for b in operation.backends if b.name == "triton" and b.unfit(on_gpu) is None]
        found = [*found, *(b for b in mine if b not in found)]
    alone = [b for b in found if not b.packages and b.name != "reference"]
    if alone or operation.name in REFERENCE_ONLY:
        found = [b for b in found if b.name != "reference"]
    return sorted(found, key=lambda b: bool(b.packages))


def draw(
    problem: Problem, device: torch.device, seed: int
) -> tuple[list[Tensor], tuple[object, ...]]:
    """Return inputs that ask for gradients, in their own memory layout, and other arguments."""
    tensors, rest = problem.draw(Source(torch.Generator(device).manual_seed(seed)))
    tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    return tensors, rest


def _run_once(stage: Stage, case: Case) -> None:
    for problem in (case.check, case.problem):
        tensors, rest = draw(problem, stage.device, 0)
        found = call(case.backend.function, tensors, rest)
        torch.autograd.backward(found, [torch.ones_like(y) for y in found])
        stage.clock.wait()


def error(case: Case, device: torch.device) -> float:
    """Return the largest error in norm of output and gradients, against float32's reference."""
    tensors, rest = draw(case.check, device, 7)
    exact = [t.detach().float() if t.is_floating_point() else t for t in tensors]
    exact = [t.requires_grad_(t.is_floating_point()) for t in exact]
    found = []
    for function, inputs in (
        (case.backend.function, tensors),
        (case.operation.backend("reference").function, exact),
    ):
        outputs, generator = call(function, inputs, rest), torch.Generator(device).manual_seed(3)
        drawn = [torch.randn(y.shape, generator=generator, device=device) for y in outputs]
        slopes = [t.bfloat16().to(y.dtype) for t, y in zip(drawn, outputs, strict=True)]
        torch.autograd.backward(outputs, slopes)
        gradients = [t.grad for t in inputs if t.grad is not None]
        found.append([*(y.detach() for y in outputs), *gradients])
    pairs = zip(*found, strict=True)
    return max(((a.float() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


def _measure(
    stage: Stage, case: Case, name: str, torch_times: dict[tuple[str, str], float]
) -> None:
    wrong = error(case, stage.device)
    clock, function = stage.clock, case.backend.function
    sets = [draw(case.problem, stage.device, seed) for seed in range(SETS)]
    outputs = call(function, *sets[0])
    slopes = [torch.randn_like(y) for y in outputs]
    passes = compulsory(case.problem, sets[0][0], outputs)
    del outputs

    def once(number: int) -> list[float]:
        (stage.out / "ops.progress").touch()
        tensors, rest = sets[number % SETS]
        for tensor in tensors:
            tensor.grad = None
        clock.flush()
        clock.hold()
        marks = [clock.mark()]
        outputs = call(function, tensors, rest)
        marks.append(clock.mark())
        torch.autograd.backward(outputs, slopes)
        return clock.milliseconds([*marks, clock.mark()])

    times = repeat(once, seconds=0.1 if stage.tiny else 0.25)
    forward = statistics.median(t[0] for t in times)
    both = statistics.median(sum(t) for t in times)
    floor = bound(passes, stage.roofs()).seconds * 1e3
    is_torch = not case.backend.packages
    if is_torch:
        torch_times.setdefault((case.name, "torch"), both)
    base = torch_times.get((case.name, "torch"))
    found = None if base is None else score(both, base, floor)
    stage.emit(
        case.name,
        backend=case.backend.name,
        is_torch=is_torch,
        forward_ms=round(forward, 4),
        ms=round(both, 4),
        floor_ms=round(floor, 4),
        of_floor=round(floor / both, 3),
        score=None if found is None else round(found, 3),
        difference=wrong,
        flag="" if wrong <= TOLERANCE else "WRONG",
        repetitions=len(times),
    )


if __name__ == "__main__":
    try:
        main()
    except Exception as problem:
        print(one_line(problem), file=sys.stderr)
        raise
