"""A stand-in for the program: it starts in no time and ends as the variable PLAY tells each start.

PLAY is a list such as `stop,done`: what the first start does, what the second.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

DEADLINE_S = 40


def main() -> int:
    command, *arguments = sys.argv[1:]
    if command == "doctor":
        return int(os.environ.get("DOCTOR", "0"))
    if command == "recipe":
        recipe, *overrides = arguments[1:]
        if not recipe.endswith(".yaml"):
            print(f"nemotron: {recipe} is no recipe.", file=sys.stderr)
            return 2
        print(f"{recipe}: valid; it creates the run {folder(overrides)}")
        return 0
    if "--dry-run" in arguments:
        print("dry run", os.environ["WORLD_SIZE"], *arguments)
        return 0
    run, start = folder(arguments), int(os.environ["START_DIR"].rpartition("-")[2])
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    record = {name: os.environ[name] for name in names} | {"arguments": arguments}
    run.mkdir(parents=True, exist_ok=True)
    rank = int(record["RANK"])
    actions = os.environ["PLAY"].split(",")
    action = actions[min(start, len(actions) - 1)]
    if action == "mistake":
        print(f"nemotron: rank {rank} found a mistake.", file=sys.stderr)
        return 2
    if action == "crash":
        return 1
    if action == "late":
        time.sleep(2)  # whoever is warned meanwhile must live, and be warned again
    asked = []
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    if rank == 0:
        write_status(run, "running", 1)
    # this says, too, that the rank can be signaled
    (run / f"start-{start}-rank-{rank}.json").write_text(json.dumps(record))
    return act(action, run, rank, start, asked)


def act(action: str, run: Path, rank: int, start: int, asked: list[int]) -> int:
    if action == "done":
        return end(run, rank, "done", 0)
    if action == "timed":
        return end(run, rank, "stopped", 75, "stop.after_minutes = 230")
    if action == "diverge":
        return end(run, rank, "failed", 1)
    if action == "die" and rank == 1:
        while not (run / f"start-{start}-rank-0.json").exists():
            time.sleep(0.01)
        print("rank 1 has seen enough", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE_S
    while not asked and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked, f"rank {rank} was never asked to stop"
    if action == "linger":  # as a save that takes long; a second Ctrl-C cuts it short
        while len(asked) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return 130
    return 1 if action == "die" else end(run, rank, "stopped", 75)


def end(run: Path, rank: int, state: str, code: int, reason: str = "SIGUSR1") -> int:
    if rank == 0:
        if state == "stopped":
            time.sleep(0.5)  # rank 1 has left before, which must not cut this one short
        write_status(run, state, code, reason)
    return code


def write_status(run: Path, state: str, code: int, reason: str = "") -> None:
    content = {"state": state, "step": 3, "exit_code": code, "reason": reason}
    text = json.dumps(content, indent=2)
    (run / "status.new").write_text(text)
    (run / "status.new").rename(run / "status.json")


def folder(arguments: list[str]) -> Path:
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    return Path(given["output"]) / given.get("name", "run")


if __name__ == "__main__":
    sys.exit(main())
