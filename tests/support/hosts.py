"""Two hosts on this machine: network namespaces with a cable between them."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Host:
    """A network namespace, with one device and its address."""

    name: str
    device: str
    address: str

    def unplug(self) -> None:
        """Cut the link: what is sent is lost, and nobody is told."""
        _ip("-n", self.name, "link", "set", self.device, "down")

    def plug(self) -> None:
        """Mend the link."""
        _ip("-n", self.name, "link", "set", self.device, "up")

    def slow_down(self, rate: str) -> None:
        """Let through no more than a rate, such as `2mbit`."""
        shape = ["tbf", "rate", rate, "burst", "16kb", "latency", "500ms"]
        _run(["tc", "-n", self.name, "qdisc", "replace", "dev", self.device, "root", *shape])

    def delay(self, milliseconds: int, lost_percent: float) -> None:
        """Send packets later, and lose some; without `sch_netem` the test is skipped."""
        shape = ["netem", "delay", f"{milliseconds}ms", "loss", f"{lost_percent}%"]
        try:
            _run(["tc", "-n", self.name, "qdisc", "replace", "dev", self.device, "root", *shape])
        except subprocess.CalledProcessError as error:
            if "qdisc kind is unknown" not in error.stderr:
                raise
            pytest.skip(f"this kernel has no sch_netem (tc netem): {error.stderr.strip()}")

    def speed_up(self) -> None:
        """Let through everything again."""
        _run(["tc", "-n", self.name, "qdisc", "del", "dev", self.device, "root"])


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts that reach each other; the test is skipped where that is not allowed."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("two hosts need ip and tc (package iproute2)")
    number = os.getpid()
    hosts = tuple(
        Host(f"nemotron-{number}-{end}", f"veth{end}", f"10.77.0.{end + 1}") for end in (0, 1)
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        first, second = hosts
        cable = ("type", "veth", "peer", "name", second.device, "netns", second.name)
        _ip("link", "add", first.device, "netns", first.name, *cable)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.device)
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.plug()
    except subprocess.CalledProcessError as error:
        _remove(hosts)
        pytest.skip(f"two hosts need root and network namespaces: {error.stderr.strip()}")
    try:
        yield first, second
    finally:
        _remove(hosts)


def _remove(hosts: tuple[Host, ...]) -> None:
    for host in hosts:
        subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _run(words: list[str]) -> None:
    subprocess.run(words, capture_output=True, text=True, check=True)
