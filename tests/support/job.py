"""A run on several processes, each started by itself as `srun` does it, without torchrun."""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemotron.run.folder import dump_recipe
from nemotron.train.config import RunConfig
from tests.support import forked
from tests.support.hosts import Host


def busy() -> float:
    """Return how much longer all takes beside what else runs: 1 on an idle machine, at most 5."""
    return min(5.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def limits(start_s: float = 60.0) -> dict[str, float]:
    """Return the section `parallel` of a test that waits for the limit of a step."""
    return {"timeout_s": 3.0 * busy(), "start_timeout_s": start_s}


class Job:
    """The processes of one start of a run."""

    def __init__(
        self,
        config: RunConfig,
        *arguments: str,
        world: int = 2,
        of_rank: Mapping[int, Sequence[str]] | None = None,
        folders: Sequence[Path] | None = None,
        hosts: Sequence[Host] | None = None,
    ) -> None:
        """Start them; `of_rank` has arguments of one rank, `folders` where each is at home.

        With `hosts`, each rank runs on a host of its own.
        """
        home = folders[0] if folders else Path.cwd()
        self.run = home / config.output / config.name
        self.run.parent.mkdir(exist_ok=True)
        recipe = self.run.with_suffix(".yaml")
        recipe.write_text(dump_recipe(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            forked.command(
                "train",
                recipe,
                *arguments,
                *(of_rank or {}).get(rank, ()),
                folder=folders[rank] if folders else None,
                namespace=hosts[rank].name if hosts else None,
                output=self.run.parent / f"{config.name}-{rank}.txt",
                environment=os.environ
                | {
                    "OMP_NUM_THREADS": "1",
                    "MASTER_ADDR": hosts[0].address if hosts else "127.0.0.1",
                    **({"GLOO_SOCKET_IFNAME": hosts[rank].device} if hosts else {}),
                    "MASTER_PORT": str(port),
                    "WORLD_SIZE": str(world),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                },
            )
            for rank in range(world)
        ]

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Return the exit codes; none may still run after so many seconds."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(deadline - time.monotonic()) for process in self.processes]
        finally:
            self.end()

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics have a step."""
        metrics = self.run / "metrics.jsonl"
        while self.is_running:
            if metrics.exists() and f'"step": {step},' in metrics.read_text():
                return
            time.sleep(0.005)
        raise AssertionError(self.text())

    @property
    def is_running(self) -> bool:
        """Whether no rank has ended."""
        return all(process.poll() is None for process in self.processes)

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            process.end()

    def text(self) -> str:
        """Return what all ranks said."""
        return "\n".join(process.text for process in self.processes)
