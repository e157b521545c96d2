"""Compare training and decoding with transformers' NemotronH on this machine.

python tools/bench/models.py [--case NAME ...] [--json FILE]

Both programs run in processes of their own and take turns, on the same weights and tokens; the
scan also with fresh inputs and cold caches. First loss and gradients must agree, then the peer's
best settings are searched, then the clock counts. A step during which other processes used more
than 10 % of the cores is dropped; a case that finds no quiet moment gives no figure.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self, cast

import torch
from cases import CASES, DTYPES, PROXIES, Case
from machine import describe

from nemotron.model.flops import training_flops_per_token
from nemotron.ops.prepare import prepare

TOLERANCE = 1e-5
"""Largest relative difference of loss, gradients or logits in float32."""
NARROW = 1.05
"""How many times as far off as those of bfloat16 alone its gradients in 16-bit integers may be."""
WARM_UPS = 2
PILOTS = 2
"""Timed steps of each setting when a side's best one is searched."""
HOPELESS, LOADING_S = 5, 10.0
"""A setting is not tried further after a step that takes so many times as long as the best one, and
more seconds than kernels need to be loaded."""


class Disagreement(Exception):
    """The two programs do not compute the same, so their times cannot be compared."""


class NotQuiet(Exception):
    """Other processes never left the machine alone for long enough."""


class Worker:
    """A program in a process of its own."""

    def __init__(self, side: str, case: Case, dtype: str, kind: str) -> None:
        self.label = " ".join(filter(None, (side, dtype, kind)))
        script = Path(__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [sys.executable, script, side, case.name, dtype, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._requests = cast(IO[str], self._process.stdin)
        self._answers = cast(IO[str], self._process.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.close()
        self._answers.close()
        self._process.wait()

    def ask(self, command: str, argument: object) -> Any:
        """Send one command and wait for its answer."""
        self._requests.write(f"{command} {argument}\n")
        self._requests.flush()
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"{self.label} ended with exit code {self._process.wait()}")
        return json.loads(line)


def check(case: Case) -> float:
    """Return the largest relative difference in float32 between the peer and each of our kinds.

    A kind that exists in bfloat16 alone is held against the peer's float32 beside another one.

    Raises:
        Disagreement: when it is above the tolerance.
    """
    with tempfile.TemporaryDirectory() as folder:

        def results(side: str, dtype: str, kind: str) -> dict[str, torch.Tensor]:
            return _results(Worker(side, case, dtype, kind), Path(folder, f"{side}-{dtype}-{kind}"))

        kinds = dict.fromkeys(kind for _, kind in case.programs("ours"))
        peer = results("peer", "fp32", "eager")
        narrow = [kind for kind in kinds if kind.startswith("numba_int16")]
        if narrow:
            bf16 = results("ours", "bf16", "numba")
        for kind in narrow:
            _check_narrow(kind, results("ours", "bf16", kind), bf16, peer)
        return max(
            _difference(results("ours", "fp32", kind), peer) for kind in kinds if kind not in narrow
        )


def _check_narrow(
    kind: str,
    int16: dict[str, torch.Tensor],
    bf16: dict[str, torch.Tensor],
    peer: dict[str, torch.Tensor],
) -> None:
    """Raise Disagreement when 16-bit integers are less exact than bfloat16 alone."""
    names = peer.keys() - {"loss"}
    whole = math.hypot(*(peer[name].norm() for name in names))
    errors = [
        math.hypot(*((found[name] - peer[name]).norm() for name in names)) / whole
        for found in (int16, bf16)
    ]
    print(f"    bf16 beside the peer's fp32: {errors[0]:.2%} with {kind}, else {errors[1]:.2%}")
    if not errors[0] <= NARROW * errors[1]:
        raise Disagreement(f"{kind} is {errors[0] / errors[1]:.2f} times as far off as bf16")


def _results(worker: Worker, path: Path) -> dict[str, torch.Tensor]:
    with worker:
        worker.ask("check", path)
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return found


def _difference(ours: dict[str, torch.Tensor], peer: dict[str, torch.Tensor]) -> float:
    if ours.keys() != peer.keys():
        raise Disagreement(f"only one program has {sorted(ours.keys() ^ peer.keys())}")
    worst, where = max(
        (((ours[name] - peer[name]).norm() / peer[name].norm()).item(), name) for name in ours
    )
    if not worst <= TOLERANCE:
        raise Disagreement(f"{where} differs by {worst:.1e} relative; at most {TOLERANCE:.0e}")
    return worst


@dataclass(frozen=True)
class Patience:
    """Until when to wait for undisturbed steps, and what counts as one."""

    deadline: float
    max_others: float


def quiet_steps(
    workers: list[Worker], steps: int, patience: Patience, longest: float = math.inf
) -> list[list[dict[str, Any]]]:
    """Let the workers take turns until each has enough undisturbed steps.

    A step that takes more seconds than `longest` is the only one.
    """
    kept: list[list[dict[str, Any]]] = [[] for _ in workers]
    turn = 0
    while min(map(len, kept)) < steps:
        if time.monotonic() > patience.deadline:
            counts = ", ".join(f"{len(k)} of {w.label}" for w, k in zip(workers, kept, strict=True))
            raise NotQuiet(f"no quiet moment: kept {counts}, need {steps} each")
        for worker, results in zip(workers, kept, strict=True):
            answer = worker.ask("step", turn)
            if answer["seconds"] > longest:
                return [[answer] for _ in workers]
            if turn >= WARM_UPS and answer["others"] <= patience.max_others:
                results.append(answer)
        turn += 1
    return kept


def best_setting(case: Case, side: str, patience: Patience) -> tuple[str, str]:
    """Return the fastest (dtype, kind) of a side, by a short trial of each."""
    settings = case.programs(side)
    if len(settings) == 1:
        return settings[0]
    seconds: dict[tuple[str, str], float] = {}
    for setting in settings:
        longest = max(LOADING_S, HOPELESS * min(seconds.values(), default=math.inf))
        with Worker(side, case, *setting) as worker:
            (steps,) = quiet_steps([worker], min(PILOTS, case.kept), patience, longest)
        seconds[setting] = min(step["seconds"] for step in steps)
        print(f"    {worker.label}: {seconds[setting]:.4g} s", flush=True)
    return min(seconds, key=seconds.__getitem__)


def compare(case: Case, kept: int, patience: Patience) -> dict[str, Any]:
    """Check one case, search both sides' best settings and time them in turns."""
    difference = check(case)
    print(f"{case.name}: largest relative difference {difference:.1e}", flush=True)
    chosen = {side: best_setting(case, side, patience) for side in ("ours", "peer")}
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(s, case, *c)) for s, c in chosen.items()]
        results = quiet_steps(workers, kept, patience)
    row: dict[str, Any] = {"case": case.name, "difference": difference}
    for worker, steps in zip(workers, results, strict=True):
        side = worker.label.split()[0]
        seconds = statistics.median(step["seconds"] for step in steps)
        row[side] = {
            "setting": worker.label,
            "seconds": seconds,
            "tokens_per_s": case.tokens_per_step / seconds,
            "rss_gib": max(step["rss_gib"] for step in steps),
            "kept": len(steps),
        }
    row["ratio"] = row["peer"]["seconds"] / row["ours"]["seconds"]
    return row


def measure_peaks() -> dict[str, float]:
    """Return the machine's FLOP/s in square matrix products, per dtype."""
    peaks = {}
    with Worker("ours", CASES[0], "fp32", "default") as worker:
        for dtype in DTYPES:
            peaks[dtype], others = worker.ask("peak", dtype)
            rate = f"{peaks[dtype] / 1e9:.0f} GFLOP/s"
            print(f"matmul peak {dtype}: {rate}, others used {others:.0%}", flush=True)
    return peaks


def format_row(case: Case, row: dict[str, Any], peaks: dict[str, float]) -> str:
    """Write a row of the table for people."""
    lines = [f"{case.name}: {row['ratio']:.2f}x (target {case.target}x, aim {case.aim}x)"]
    for side in ("ours", "peer"):
        result = row[side]
        line = f"  {result['setting']:24s} {result['seconds']:.4g} s"
        line += f", {result['tokens_per_s']:,.0f} tokens/s, {result['rss_gib']:.2f} GiB"
        if case.kind == "train":
            config, dtype = PROXIES[case.proxy], result["setting"].split()[1]
            flops = training_flops_per_token(config, case.tokens, 0) * result["tokens_per_s"]
            share = flops / peaks[dtype]
            line += f", {flops / 1e9:.0f} GFLOP/s, {share:.0%} of the matmul peak"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    """Run the chosen cases; return 1 when one gave no figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="run only this (repeatable)")
    parser.add_argument("--json", type=Path, help="append the results to this file, as one line")
    parser.add_argument(
        "--kept", type=int, help="undisturbed steps per program (default 5; 2 long)"
    )
    parser.add_argument("--patience", type=float, default=900, help="seconds to wait for quiet")
    parser.add_argument(
        "--max-others", type=float, default=0.10, help="drop a step when others use more cores"
    )
    options = parser.parse_args()
    prepare()  # no step compiles
    peaks = measure_peaks()
    rows, failed = [], []
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        try:
            patience = Patience(time.monotonic() + options.patience, options.max_others)
            row = compare(case, options.kept or case.kept, patience)
        except (Disagreement, NotQuiet) as problem:
            print(f"{case.name}: no figure: {problem}", flush=True)
            failed.append({"case": case.name, "problem": str(problem)})
            continue
        print(format_row(case, row, peaks), flush=True)
        rows.append({**row, "target": case.target, "aim": case.aim})
    if options.json:
        line = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **describe(),
            "max_others": options.max_others,
            "matmul_peak": peaks,
            "rows": rows,
            "no_figure": failed,
        }
        with options.json.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
