"""Extra stage: the speed of light of each chosen backend, as `nemotron doctor --bench` measures it.

Unlike `ops`, each backend and its readable reference have a process of their own, and inputs are
fresh in every repetition. Not one of the usual stages.
"""

import math

from stage import Stage, parser

from nemotron.sol.machine import probe
from nemotron.sol.run import NoFigure, Patience, candidates, measure

ANYWAY = Patience(30.0, math.inf)
"""What other programs do on the host matters little to a GPU's own clock."""
MARGIN_S = 10.0
"""Of the stage's time, for the problem that is measured last."""


def main() -> None:
    stage = Stage("sol", parser(__doc__).parse_args())
    machine = probe(stage.device)
    stage.emit("roofs", bandwidth=machine.bandwidth, **machine.peaks)
    for candidate in candidates("tiny" if stage.tiny else "nano", "bfloat16", stage.device):
        if stage.left() < MARGIN_S:
            stage.emit(candidate.name, skipped="no time left")
            continue
        with stage.attempt(candidate.name):
            try:
                facts = measure(candidate, machine, ANYWAY).facts()
            except NoFigure as problem:
                stage.emit(candidate.name, error=str(problem))
            else:
                stage.emit(candidate.name, **facts)


if __name__ == "__main__":
    main()
