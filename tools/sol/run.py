"""Measure operations against what the device allows: a table, lines of JSON, a drawing.

python tools/sol/run.py [--op ssd ...] [--size nano-proxy] [--dtype float32 ...] [--json FILE]

Every chosen backend and its readable reference run in a process each and take turns, on fresh
inputs at other addresses and with nothing in the caches. Results are compared with float64 before
and after; a time below the bound is refused. nemotron/sol/ says what is counted.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from nemotron.device import find_device
from nemotron.errors import UserError
from nemotron.exit_codes import DONE, FAILED
from nemotron.ops.apply import ALL
from nemotron.sol import report
from nemotron.sol.machine import Machine, known_machine, machine_file, probe, read, write
from nemotron.sol.run import NoFigure, Patience, Result, candidates, measure
from nemotron.sol.sizes import SIZES, Rows
from nemotron.sol.worker import DTYPES


def main() -> int:
    """Measure what is asked for; 1 where something gave no figure."""
    try:
        return _measure(_options())
    except UserError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    names = [operation.name for operation in ALL]
    parser.add_argument("--op", action="append", default=[], choices=names, help="repeatable")
    parser.add_argument("--size", action="append", choices=list(SIZES), help="default: nano-proxy")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: both")
    parser.add_argument("--backend", help="this one instead of the one that training chooses")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, help="of one row, instead of the usual rows")
    parser.add_argument("--machine", default="auto", help="file of roofs, or auto: this machine's")
    parser.add_argument("--probe", action="store_true", help="measure the roofs again")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for quiet")
    parser.add_argument("--max-others", type=float, default=0.10, help="share of the cores")
    parser.add_argument("--json", type=Path, help="append a line for each result to this file")
    parser.add_argument("--before", type=Path, help="such a file, whose scores are shown beside")
    parser.add_argument("--svg", type=Path, help="write a drawing of the scores")
    return parser.parse_args()


def _measure(options: argparse.Namespace) -> int:
    device = find_device(options.device)
    machine = _machine(options, device)
    print(f"{machine.device}, {machine.threads} threads: {report.roofs_line(machine)}", flush=True)
    before = _scores(options.before)
    heads = [*report.HEADS, *(["before"] if before else [])]
    rows = None if options.tokens is None else Rows(1, options.tokens)
    patience = Patience(options.patience, options.max_others)
    results: list[Result] = []
    failed = False
    for size in options.size or ["nano-proxy"]:
        for dtype in options.dtype or DTYPES:
            print(f"\n{size}, {dtype}\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
            chosen = {"rows": rows, "operations": options.op, "backend": options.backend}
            for candidate in candidates(size, dtype, device, **chosen):
                try:
                    result = measure(candidate, machine, patience)
                except NoFigure as problem:
                    print(f"| {candidate.name} | {candidate.backend} | no figure: {problem} |")
                    failed = True
                    continue
                cells = report.cells(result)
                if before:
                    known = before.get(report.place(result))
                    cells.append("" if known is None else f"{known:.2f}")
                print(f"| {' | '.join(cells)} |", flush=True)
                results.append(result)
                if options.json:
                    _append(options.json, result, machine)
    if options.svg and results:
        options.svg.write_text(report.drawing(results, f"SOL scores, {machine.device}", before))
    return FAILED if failed else DONE


def _machine(options: argparse.Namespace, device: torch.device) -> Machine:
    if options.machine != "auto":
        return read(Path(options.machine))
    if options.probe:
        return write(probe(device), machine_file(device))
    return known_machine(device)


def _scores(path: Path | None) -> report.Scores:
    if path is None:
        return {}
    found = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found[row["problem"], row["size"], row["dtype"]] = row["score"]
    return found


def _append(path: Path, result: Result, machine: Machine) -> None:
    line = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **result.facts(),
        "machine": machine.model_dump(),
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
