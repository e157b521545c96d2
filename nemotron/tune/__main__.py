"""Command line of the search: python -m nemotron.tune OPERATION --shapes nano."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nemotron.errors import UserError
from nemotron.exit_codes import DONE, FAILED
from nemotron.ops.tuning import base
from nemotron.ops.tuning.base import Base
from nemotron.tune.candidates import order, text
from nemotron.tune.compiled import Pool
from nemotron.tune.problems import PROBLEMS, Target, sizes_of, targets
from nemotron.tune.search import FIRST_BATCH, Search
from nemotron.tune.timing import Timer
from nemotron.tune.verify import verify

DEFAULT_SHAPES = "nano"


def main(words: Sequence[str] | None = None) -> int:
    """Search, verify, or list what compiles; returns the exit code."""
    try:
        return _main(_options(words))
    except UserError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nemotron.tune", description="Search for launch parameters of kernels."
    )
    launches = sorted({t.operation for problem in PROBLEMS for t in problem.tunables})
    parser.add_argument(
        "operation", help=f"all, or one of {', '.join(launches)}, or a launch such as 'ssd outputs'"
    )
    parser.add_argument(
        "--shapes", action="append", help="nano, super, or a recipe's file; repeatable"
    )
    parser.add_argument("--seconds", type=float, default=60, help="time for the search")
    parser.add_argument("--write", action="store_true", help="into the package's own file")
    parser.add_argument("--out", type=Path, help="file to write instead of the user's")
    parser.add_argument("--verify", action="store_true", help="time known entries again")
    parser.add_argument("--compile-only", action="store_true", help="list candidates that compile")
    parser.add_argument("--arch", default="sm90", help="with --compile-only; default: sm90")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile")
    parser.add_argument("--candidates", type=int, default=FIRST_BATCH, help="with --compile-only")
    return parser.parse_args(words)


def _main(options: argparse.Namespace) -> int:
    sizes = [sizes_of(shapes) for shapes in options.shapes or [DEFAULT_SHAPES]]
    chosen = targets(options.operation, sizes)
    if not chosen:
        names = sorted({t.tunable.operation for t in targets("all", sizes)})
        rule = f"is unknown; use all or one of {', '.join(names)}."
        raise UserError(rule, key="operation", value=options.operation)
    if options.compile_only:
        return compile_only(chosen, options)
    if not torch.cuda.is_available():
        raise UserError("tune: torch finds no CUDA device; --compile-only needs none.")
    device = torch.device("cuda", torch.cuda.current_device())
    name = base.architecture_of(device)
    assert name is not None
    path = base.shipped_file(name) if options.write else base.user_file(name)
    path = options.out or path
    known = _merged(base.read(path, name), base.read(base.shipped_file(name), name))
    timer = Timer(device)
    print(f"{timer.name}: {timer.bandwidth / 1e12:.2f} TB/s, {timer.flops / 1e12:.0f} TFLOP/s")
    if options.verify:
        complaints = verify(chosen, known, timer, _say)
        for complaint in complaints:
            _say(complaint)
        return FAILED if complaints else DONE
    with Pool(name, options.processes) as pool:
        search = Search(chosen, known, timer, pool, _say, lambda found: base.write(path, found))
        search.run(options.seconds)
    base.known.cache_clear()
    _say(f"wrote {path}: {len(search.found.entries)} entries")
    return DONE


def compile_only(chosen: Sequence[Target], options: argparse.Namespace) -> int:
    """Compile the first candidates of each launch and print their registers and memory."""
    jobs = []
    for target in chosen:
        binds = "compute" if target.problem.flops(target.sizes) else "memory"
        default = target.tunable.default(torch.bfloat16)
        ordered = order(target.tunable, default, [], binds)
        jobs += [(target, c) for _, c in zip(range(options.candidates), ordered, strict=False)]
    with Pool(options.arch, options.processes) as pool:
        results = pool.compile(jobs, time.monotonic() + options.seconds)
    for number, (target, configuration) in enumerate(jobs):
        if (found := results.get(number)) is None:
            continue
        said = found.unfit() or "fine"
        _say(
            f"{target.tunable.name}: {text(configuration)}: {found.registers} registers, "
            f"{found.stack} stack, {found.shared} shared: {said}"
        )
    late = len(jobs) - len(results)
    if late:
        _say(f"{late} of {len(jobs)} candidates were not compiled in {options.seconds:.0f} s")
    return DONE


def _merged(own: Base, shipped: Base) -> Base:
    """Return a file's entries and those of the shipped one that it lacks."""
    has = {(e.operation, e.launch, e.dtype, str(sorted(e.axes.items()))) for e in own.entries}
    rest = [
        e
        for e in shipped.entries
        if (e.operation, e.launch, e.dtype, str(sorted(e.axes.items()))) not in has
    ]
    lessons = (*own.lessons, *(x for x in shipped.lessons if x not in own.lessons))
    return own.model_copy(update={"entries": (*own.entries, *rest), "lessons": lessons})


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
