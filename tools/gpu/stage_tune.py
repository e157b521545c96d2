"""Last stage: search for the launch parameters of kernels; a new tuning base lies in the results.

Not one of the usual stages. Nano's shapes are searched first; with time left, Super's.
"""

import shutil
import sys
from collections.abc import Sequence

from stage import Stage, one_line, parser

from nemotron.ops.tuning import base
from nemotron.sol.sizes import SIZES, Size
from nemotron.tune.compiled import Compiled, Job, Pool
from nemotron.tune.problems import targets
from nemotron.tune.search import Search
from nemotron.tune.timing import Timer

MARGIN_S = 5.0
"""Of the stage's time, for the launch that is timed last."""


class NoCompiler:
    """Where kernels are interpreted, every candidate is fine."""

    def compile(self, jobs: Sequence[Job], until: float) -> dict[int, Compiled]:
        few = jobs[:40]
        return {n: Compiled(launches=(str(c),)) for n, (_, c) in enumerate(few)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--operation", default="all", help="or one, or a launch")
    options.add_argument("--shapes", default="nano,super", help="in the order of the search")
    options.add_argument("--processes", type=int, default=14, help="that compile")
    options.add_argument("--share", type=float, default=0.75, help="of the time for the first")
    stage = Stage("tune", options.parse_args())
    asked = stage.options
    name = base.architecture_of(stage.device) or "sm90"
    path = stage.out / f"{name}.json"
    if not path.exists():
        shutil.copy(base.shipped_file(name), path)

    shown = list(base.read(path, name).entries)

    def say(line: str) -> None:
        print(line, flush=True)

    def keep(found: base.Base) -> None:
        base.write(path, found)
        for entry in found.entries:
            if entry not in shown:
                shown.append(entry)
                report(stage, entry)

    with stage.attempt("tune"), Pool(name, asked.processes) as pool:
        shapes = ["tiny"] if stage.tiny else asked.shapes.split(",")
        device = Timer(stage.device)
        settled: dict[tuple[object, ...], Size] = {}
        compiler = NoCompiler() if stage.tiny else pool
        for place, shape in enumerate(shapes):
            is_last = place == len(shapes) - 1
            seconds = (stage.left() - MARGIN_S) * (1 if is_last else asked.share)
            if seconds < 10:
                break
            chosen = targets(asked.operation, [SIZES[shape]])
            say(f"{shape}: {len(chosen)} launches, {seconds:.0f} s")
            known = base.read(path, name)
            search = Search(chosen, known, device, compiler, say, keep)
            search.settled |= settled
            search.run(seconds)
            settled = search.settled


def report(stage: Stage, entry: base.Entry) -> None:
    """Emit what was found for one launch."""
    places = " ".join(map(str, entry.axes.values()))
    stage.emit(
        f"{entry.operation} {entry.launch} {entry.dtype} {places}",
        us=entry.time_us,
        default_us=entry.default_us,
        floor_us=entry.floor_us,
        configuration=entry.configuration,
        difference=entry.error,
    )


if __name__ == "__main__":
    try:
        main()
    except Exception as problem:
        print(one_line(problem), file=sys.stderr)
        raise
