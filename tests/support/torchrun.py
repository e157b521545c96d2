"""A run that `torchrun` starts on every host, as `launch/README.md` says."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from nemotron.run.folder import dump_recipe
from nemotron.train.config import RunConfig
from tests.support.cluster import ROOT, clean_environment
from tests.support.hosts import Host
from tests.support.quick_python import environment

MARK = "NODE_OF_TEST"
"""The variable that says to which node of which start a process belongs."""


class TorchrunJob:
    """One start of a run, with one rank on each host."""

    _starts = itertools.count()

    def __init__(self, config: RunConfig, hosts: Sequence[Host], *arguments: str) -> None:
        self.run = Path(config.output) / config.name
        self.run.parent.mkdir(exist_ok=True)
        recipe = self.run.with_suffix(".yaml")
        recipe.write_text(dump_recipe(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._outputs = [self.run.parent / f"node-{number}.txt" for number in range(len(hosts))]
        self.nodes: list[subprocess.Popen] = []
        self._marks: list[str] = []
        for number, host in enumerate(hosts):
            python = environment()["PYTHON_EXEC"]
            torchrun = [
                *("ip", "netns", "exec", host.name, python, "-P"),
                *("-m", "torch.distributed.run", "--nnodes", str(len(hosts))),
                *("--node-rank", str(number), "--nproc-per-node", "1"),
                *("--master-addr", hosts[0].address, "--master-port", str(port)),
            ]
            mark = f"{os.getpid()}-{next(self._starts)}"
            self._marks.append(mark)
            values = environment() | {
                MARK: mark,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "GLOO_SOCKET_IFNAME": host.device,
            }
            with open(self._outputs[number], "w") as output:
                self.nodes.append(
                    subprocess.Popen(
                        [*torchrun, "-m", "nemotron", "train", recipe, *arguments],
                        env=clean_environment() | values,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    @property
    def texts(self) -> list[str]:
        """What each node and its rank said."""
        return [output.read_text() for output in self._outputs]

    @property
    def is_running(self) -> bool:
        """Whether no node has ended."""
        return all(node.poll() is None for node in self.nodes)

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics have a step."""
        metrics = self.run / "metrics.jsonl"
        while self.is_running:
            if metrics.exists() and f'"step": {step},' in metrics.read_text():
                return
            time.sleep(0.005)
        raise AssertionError("\n".join(self.texts))

    def wait(self, seconds: float) -> list[int]:
        """Return the exit codes; no node may still run after so many seconds."""
        deadline = time.monotonic() + seconds
        try:
            return [node.wait(deadline - time.monotonic()) for node in self.nodes]
        except subprocess.TimeoutExpired:
            raise AssertionError("\n".join(self.texts)) from None
        finally:
            self.end()

    def kill(self, number: int) -> None:
        """End all processes of a node without a word."""
        node = self.nodes[number]
        for pid in _marked(self._marks[number]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def end(self) -> None:
        """Kill what still runs."""
        for number in range(len(self.nodes)):
            self.kill(number)


def _marked(mark: str) -> list[int]:
    """Return the processes that were started with a mark in their environment."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
