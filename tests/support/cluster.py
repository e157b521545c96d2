"""A cluster on this machine: stand-ins for SLURM's commands that start real processes."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.job import busy

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SBATCH = ROOT / "launch" / "slurm.sbatch"
TORCHRUN = ROOT / "launch" / "torchrun.sh"
SMOKE = ROOT / "recipes" / "tiny" / "smoke.yaml"
SHORT = [
    *("device=cpu", "parallel.dp_shard=2", "output=runs", "schedule.total_steps=24"),
    *("batch.global_tokens=128", "batch.micro_batch=1"),
]
"""Settings of a run of `SMOKE` on two ranks."""
STAND_IN = f"{sys.executable} {HERE / 'stand_in_trainer.py'}"
PATIENCE_S = 60.0 * min(4.0, 2.0 * busy())

LOG_CALL = """#!{python}
import json, os, sys
with open(os.environ["SLURM_CALLS"], "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\n127.0.0.1")
if sys.argv[1:3] == ["show", "job"]:
    print("JobId=7 JobState=" + os.environ.get("JOB_STATE", "RUNNING"))
"""


def clean_environment() -> dict[str, str]:
    """Return this environment without what would name a rank, and with this Python first."""
    strange = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "TORCHELASTIC", "OMP_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return env


class Launched:
    """A launcher at work."""

    def __init__(self, command: list[str], env: dict[str, str], folder: Path) -> None:
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                command,
                env=env,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        """Signal the launcher alone, as `--signal=B:` and `docker stop` do."""
        self.process.send_signal(number)

    def ctrl_c(self) -> None:
        """Signal the launcher and whatever shares its process group, as a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"the launcher does not end: {self.text}") from None

    @property
    def text(self) -> str:
        """What it and its ranks wrote so far."""
        return self.output.read_text()


def wait_until(
    condition: Callable[[], object], what: str, launched: Launched | None = None
) -> None:
    """Wait until a condition holds; fail with `what` when it never does, or all have left."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        text = launched.text if launched else ""
        assert time.monotonic() < deadline, f"waited in vain until {what}: {text}"
        has_left = launched is not None and launched.process.poll() is not None
        assert not has_left or condition(), f"it left before {what}: {text}"
        time.sleep(0.02)


class Cluster:
    """Two nodes of one task, with the commands of SLURM on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls.jsonl"
        self.calls_file.touch()
        programs = folder / "bin"
        programs.mkdir()
        for name in ("scontrol", "scancel"):
            write_program(programs / name, LOG_CALL.format(python=sys.executable))
        starter = shlex.join([sys.executable, str(HERE / "stand_in_srun.py")])
        write_program(programs / "srun", f'#!/bin/sh\nexec {starter} "$@"\n')
        env = clean_environment()
        self.env = env | {
            "PATH": f"{programs}:{env['PATH']}",
            "SLURM_CALLS": str(self.calls_file),
            "TASKS_PER_NODE": "1",
            "NEMOTRON": STAND_IN,
            "SKIP_DOCTOR": "1",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": str(free_job_id()),
            "SLURM_JOB_NODELIST": "invented[1-2]",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }

    def start(self, *arguments: str | Path, restart: int = 0, **env: str) -> Launched:
        """Start the batch script as SLURM does after so many restarts."""
        values = self.env | env
        if restart:
            values["SLURM_RESTART_COUNT"] = str(restart)
        # SLURM runs a copy
        copy = self.folder / "slurm_script"
        copy.write_text(SBATCH.read_text())
        return Launched(["bash", str(copy), *map(str, arguments)], values, self.folder)

    def calls(self, program: str) -> list[list]:
        """Return how a command was called so far."""
        lines = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        return [rest for name, *rest in lines if name == program]

    @property
    def requeues(self) -> int:
        """How often the job was put back into the queue."""
        return sum(call[0] == "requeue" for call in self.calls("scontrol"))


def write_program(path: Path, text: str) -> None:
    """Write a file that can be run."""
    path.write_text(text)
    path.chmod(0o755)


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def free_job_id() -> int:
    """Return an id whose ports, as the batch script derives them, are free."""
    for job in range(os.getpid() % 5000 + 1, 10000):
        port = 10000 + 2 * job % 20000
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return job
    raise AssertionError("every port is in use")


def records(run: Path, start: int) -> list[dict]:
    """Return what each rank of a start of the stand-in was given, in order of ranks."""
    files = sorted(run.glob(f"start-{start}-rank-*.json"))
    return [json.loads(file.read_text()) for file in files]


def both_run(run: Path, start: int = 0) -> Callable[[], bool]:
    """Return a condition: both ranks of the stand-in can be signaled."""
    return lambda: all((run / f"start-{start}-rank-{rank}.json").exists() for rank in (0, 1))


def state(run: Path) -> str:
    """Return the state that the run's own marker tells."""
    return json.loads((run / "status.json").read_text())["state"]


def num_logged(run: Path) -> int:
    """Return how many training steps a run has logged."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.exists() else 0
