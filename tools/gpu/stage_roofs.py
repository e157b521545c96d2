"""Stage 2: what this device reaches in products and copies, on random data."""

import statistics
import subprocess
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from stage import Stage, parser
from torch import Tensor

from nemotron.sol.clock import repeat

CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
EXPERTS, ROWS, HIDDEN, WIDTH = 16, 3072, 2688, 1856


def main() -> None:
    stage = Stage("roofs", parser(__doc__).parse_args())
    size = 256 if stage.tiny else 8192
    generator = torch.Generator(stage.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=stage.device)
        return drawn.to(torch.bfloat16)

    with stage.attempt("bf16 8192"):
        a, b, out = normal(size, size), normal(size, size), normal(size, size)
        _rate(stage, "bf16 8192", 2.0 * size**3, lambda: torch.mm(a, b, out=out))
    with stage.attempt("fp8 8192"):
        one = torch.ones((), device=stage.device)
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T.contiguous().T
        _rate(
            stage,
            "fp8 8192",
            2.0 * size**3,
            lambda: torch._scaled_mm(x, y, one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
        )
        del a, b, out, x, y
    with stage.attempt("copy"):
        elements = (1 << 20) if stage.tiny else 1 << 31
        source = torch.zeros(elements, dtype=torch.int8, device=stage.device).random_()
        target = torch.empty_like(source)
        _rate(stage, "copy", 2.0 * elements, lambda: target.copy_(source))
        del source, target
    if stage.clock.is_gpu:
        with stage.attempt("clocks"):
            command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            stage.emit("clocks", nvidia_smi=ran.stdout.strip())
    experts, rows = (2, 64) if stage.tiny else (EXPERTS, ROWS)
    hidden, width = (64, 32) if stage.tiny else (HIDDEN, WIDTH)
    ends = torch.arange(1, experts + 1, device=stage.device, dtype=torch.int32) * rows
    for name, k, n in (("up", hidden, width), ("down", width, hidden)):
        x, weight, dy = normal(experts * rows, k), normal(experts, n, k), normal(experts * rows, n)
        operands = {"y": (x, weight.mT), "dx": (dy, weight), "dw": (dy.mT, x)}
        for label, (left, right) in operands.items():
            case = f"grouped_mm {name} {label}"
            with stage.attempt(case):
                product = partial(F.grouped_mm, left, right, offs=ends)
                _rate(stage, case, 2.0 * experts * rows * k * n, product)


def _rate(stage: Stage, case: str, work: float, run: Callable[[], Tensor]) -> None:
    """Emit the rate of the median repetition."""

    def once(_: int) -> list[float]:
        stage.clock.flush()
        marks = [stage.clock.mark()]
        run()
        return stage.clock.milliseconds([*marks, stage.clock.mark()])

    once(0)
    found = repeat(once, seconds=0.05 if stage.tiny else 0.4, at_least=5, at_most=50)
    ms = statistics.median(times[0] for times in found)
    stage.emit(case, ms=round(ms, 4), rate=work / ms * 1e3, repetitions=len(found))


if __name__ == "__main__":
    main()
