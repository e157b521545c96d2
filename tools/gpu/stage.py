"""What every stage of the GPU program has: its options, its time, and where results go."""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from table import RESULTS

from nemotron.sol.bound import Roofs
from nemotron.sol.clock import Clock

ROOT = Path(__file__).parents[2]


class Stage:
    """One stage in a process of its own; its results are lines of JSON, appended at once."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.tiny: bool = options.tiny
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self._end = time.monotonic() + options.seconds
        self.device = torch.device("cpu" if options.tiny else "cuda")
        self.clock = Clock(self.device)
        if options.tiny:
            torch.set_num_threads(1)

    def left(self) -> float:
        """Return the seconds that this stage may still take."""
        return self._end - time.monotonic()

    def emit(self, case: str, **values: Any) -> None:
        """Append one result."""
        append(self.out, self.name, case, **values)

    @contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """Turn an exception into a result, so that what follows still runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.emit(case, error=one_line(error))
            if "CUDA error" in str(error) or "illegal memory" in str(error):
                raise  # nothing works in this process any more

    def roofs(self) -> Roofs:
        """Return FLOP/s and bytes/s that this device reached, else those of its data sheet."""
        found = {
            row["case"]: row for row in read(self.out) if row["stage"] == "roofs" and "rate" in row
        }
        known = data_sheet(self.device)
        flops = found.get("bf16 8192", {}).get("rate", known.flops)
        return Roofs(flops, found.get("copy", {}).get("rate", known.bandwidth))


def data_sheet(device: torch.device) -> Roofs:
    """Return dense bf16 FLOP/s and bytes/s by the vendor; of a CPU, something of its size."""
    if device.type == "cpu":
        return Roofs(1e11, 1e10)
    return Roofs(989e12, 4.8e12 if "H200" in torch.cuda.get_device_name() else 3.35e12)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every stage."""
    found = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    found.add_argument("--out", type=Path, required=True, help="folder of results and logs")
    found.add_argument("--seconds", type=float, default=60, help="time for this stage")
    found.add_argument("--tiny", action="store_true", help="on a CPU, at sizes that only show bugs")
    return found


def append(out: Path, stage: str, case: str, **values: Any) -> None:
    """Append a line with one write, so that processes may do so at the same time."""
    line = json.dumps({"stage": stage, "case": case, **values}, default=str) + "\n"
    file = os.open(out / RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)
    print(line, end="", file=sys.stderr, flush=True)


def read(out: Path) -> list[dict[str, Any]]:
    """Return all results so far."""
    path = out / RESULTS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def one_line(error: BaseException) -> str:
    """Return the kind of an exception and the start of its text, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]
