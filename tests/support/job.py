"""A run on several processes, each started by itself as `srun` does it, without torchrun."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from nemotron.run.folder import dump_recipe
from nemotron.train.config import PretrainConfig

ROOT = Path(__file__).parents[2]

TIMEOUT_S = 3.0
"""Of any step but the first."""


class Job:
    """The processes of one start of a run."""

    def __init__(self, config: PretrainConfig, *arguments: str, world: int = 2) -> None:
        self.run = Path(config.output) / config.name
        self.run.parent.mkdir(exist_ok=True)
        recipe = self.run.with_suffix(".yaml")
        recipe.write_text(dump_recipe(config))
        command = [sys.executable, "-m", "nemotron", "train", str(recipe), *arguments]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.outputs = [self.run.parent / f"{config.name}-{rank}.txt" for rank in range(world)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            environment = os.environ | {
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(world),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=environment)
                )

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Return the exit codes; none may still run after so many seconds."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.0, deadline - time.monotonic())) for p in self.processes]
        finally:
            self.end()

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics have a step."""
        metrics = self.run / "metrics.jsonl"
        while all(process.poll() is None for process in self.processes):
            if metrics.exists() and f'"step": {step},' in metrics.read_text():
                return
            time.sleep(0.005)
        raise AssertionError(self.text())

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def text(self) -> str:
        """Return what all ranks said."""
        return "\n".join(output.read_text() for output in self.outputs)
