"""Does jobs, a list of them a line, and answers each with a line of its own.

What an environment raises is not caught: the process ends with its traceback, and the pool that
started it (`nemotron.posttrain.verify`) counts a fault and starts another.
"""

import dataclasses
import json
import os
import signal
import sys
from typing import Any

from nemotron.posttrain.environments.base import Environment, Response
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.environments.wire import LOADED

SPARE_S = 1.0
"""Time in which the pool has killed this process, if the pool is alive."""


def main() -> None:
    """Answer jobs until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is not an answer
    environments: dict[str, Environment] = {}
    for line in sys.stdin:
        for job in json.loads(line):
            if _load(job, environments):
                answers.write(json.dumps(LOADED) + "\n")
                answers.flush()
            # ends this process in the middle of a job when no process is left to kill it
            signal.setitimer(signal.ITIMER_REAL, job["timeout_s"] + SPARE_S)
            answers.write(json.dumps(_do(job, environments)) + "\n")
            # at once: what follows may hang, and this verdict would be lost with it
            answers.flush()
            signal.setitimer(signal.ITIMER_REAL, 0)


def _load(job: dict[str, Any], environments: dict[str, Environment]) -> bool:
    """Load the environment of a job; returns whether it was not there yet."""
    name = job["environment"]
    if name in environments:
        return False
    environments[name] = find_environment(job["made_as"], job["options"])
    return True


def _do(job: dict[str, Any], environments: dict[str, Environment]) -> dict[str, Any]:
    environment, row = environments[job["environment"]], job["row"]
    if job["kind"] == "begin":
        state = environment.seed(row)
        return {"state": state, "has_tools": state is not None and bool(environment.tools(row))}
    state = job["state"]
    if job["kind"] == "call":
        said = [environment.call(state, call["name"], call["arguments"]) for call in job["calls"]]
        return {"said": said, "state": state}
    given = job["response"]
    response = Response(**{**given, "output": tuple(given["output"])})
    return dataclasses.asdict(environment.verify(row, response, state))


if __name__ == "__main__":
    main()
