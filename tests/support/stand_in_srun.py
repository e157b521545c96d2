"""A stand-in for srun: starts the tasks here, on invented nodes, and treats signals as srun does.

SIGTERM kills the tasks; other signals reach the processes that it started and not their children.
"""

import json
import os
import signal
import subprocess
import sys
import time


def main() -> int:
    options, command = {}, list(sys.argv[1:])
    while command[0].startswith("--"):
        name, _, value = command.pop(0).partition("=")
        options[name] = value
    with open(os.environ["SLURM_CALLS"], "a") as calls:
        calls.write(json.dumps(["srun", options, command]) + "\n")
    count = int(options["--ntasks"])
    per_node = int(os.environ["TASKS_PER_NODE"])
    tasks: list[subprocess.Popen] = []

    def signal_tasks(number: int, frame: object) -> None:
        for task in tasks:
            if task.poll() is None:
                os.kill(task.pid, number)

    def kill_tasks(*_: object) -> None:
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGKILL)

    signal.signal(signal.SIGUSR1, signal_tasks)
    signal.signal(signal.SIGTERM, kill_tasks)
    for rank in range(count):
        place = {
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank % per_node,
            "SLURM_NODEID": rank // per_node,
            "SLURM_NTASKS": count,
        }
        env = os.environ | {name: str(value) for name, value in place.items()}
        tasks.append(subprocess.Popen(command, env=env, start_new_session=True))
    while None in [task.poll() for task in tasks]:
        if "--kill-on-bad-exit" in options and any(task.returncode for task in tasks):
            kill_tasks()
        time.sleep(0.02)
    codes = [task.returncode for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit(main())
