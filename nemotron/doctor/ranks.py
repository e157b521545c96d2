"""`nemotron doctor --ranks`: ranks connect, report their machines, and are compared."""

import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from rich.box import SIMPLE
from rich.table import Table

from nemotron.console import LOG_WIDTH, PrintableConsole
from nemotron.device import synchronize
from nemotron.doctor.report import RankReport, differences, remarks, report, resolve, spell
from nemotron.exit_codes import DONE, FAILED
from nemotron.parallel.runtime import Launch, leave_alone

SMALL, MEDIUM = 1 << 10, 1 << 22
"""Elements (fp32) of the sums that are timed: 4 KiB shows latency, 16 MiB bandwidth."""

COLUMNS = (
    *("machine", "ranks", "device", "cores", "threads", "memory", "free here", "/dev/shm"),
    *("open files", "rank 0 at", "clock"),
)

POLL_S = 0.1
GRACE_S = 5.0


class NotMet(Exception):
    """The ranks did not connect; the message is empty if another rank gives the reason."""


@dataclass(frozen=True)
class Seat:
    """Which rank of how many this process is, and where all of them meet."""

    launch: Launch
    hosted: bool
    """Whether the starter keeps the meeting point, instead of rank 0."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.launch.rank

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.launch.world

    @property
    def host(self) -> str:
        """Where the first rank can be reached."""
        return self.launch.host

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.launch.port


def compare_ranks(timeout_s: float) -> int:
    """Compare all ranks; returns 0 if they fit together, else 1, the same on every rank.

    A process that torchrun or srun started as one rank does not return: it leaves with that code.

    Raises:
        UserError: when the environment names only a part of what a rank must know.
    """
    seat = _seat()
    if seat is None:
        one = report(0, 0, "localhost")
        _print_report([one], [], list(differences([one])))
        return DONE
    code = FAILED
    try:
        code = _examine(seat, timeout_s)
    except NotMet as problem:
        if text := str(problem):
            print(f"nemotron: {text}", file=sys.stderr)
    leave_alone(code)


def _seat() -> Seat | None:
    launch = Launch.of_this_process()
    if launch is None:
        return None
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Seat(launch, hosted)


def _examine(seat: Seat, timeout_s: float) -> int:
    store = _meet(seat, timeout_s)
    timeout = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", store),
            rank=seat.rank,
            world_size=seat.world,
            timeout=timeout,
        )
        reports = _gather(report(seat.rank, seat.launch.local_rank, seat.host))
        found = list(differences(reports))
        times = [f"gloo {_time_sums(torch.device('cpu'))}"]
        if all(one.device_id for one in reports) and not found:
            torch.cuda.set_device(seat.launch.local_rank)
            device = torch.device("cuda", seat.launch.local_rank)
            times.append(f"nccl {_time_sums(device, dist.new_group(backend='nccl'))}")
        if seat.rank == 0:
            _print_report(reports, times, found)
        dist.barrier()
    except RuntimeError as error:  # what torch raises for a lost or silent peer, of any back end
        own = platform.node()
        raise NotMet(
            f"rank {seat.rank} on {own} lost the connection to the other ranks: "
            f"{_first_line(error)}; {own} means "
            f"{resolve(own)} here, and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME can name the "
            f"network interface."
        ) from None
    dist.destroy_process_group()
    return FAILED if found else DONE


def _meet(seat: Seat, timeout_s: float) -> dist.Store:
    """Return the store after every rank has registered in it.

    Raises:
        NotMet: naming the ranks that did not come.
    """
    own, deadline = platform.node(), time.monotonic() + timeout_s
    store = dist.PrefixStore("doctor", _open_store(seat, deadline, timeout_s))
    keys = [f"rank/{rank}" for rank in range(seat.world)]
    store.set(keys[seat.rank], own)
    count = store.add(f"count/{seat.rank}", 1)
    if count > 1:
        raise NotMet(
            f"{count} processes say that they are rank {seat.rank}, one of them on {own}; "
            f"RANK must differ from process to process."
        )
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    arrived = [rank for rank, key in enumerate(keys) if store.check([key])]
    if len(arrived) == seat.world:
        return store
    # the process that keeps the store must not end before the others have read it
    store.add("left", 1)
    while seat.rank == 0 and store.add("left", 0) < len(arrived):
        if time.monotonic() > deadline + GRACE_S:
            break
        time.sleep(POLL_S)
    if seat.rank != arrived[0]:
        raise NotMet
    hosts = {rank: store.get(keys[rank]).decode() for rank in arrived}
    raise NotMet(_absence(hosts, seat.world, timeout_s))


def _open_store(seat: Seat, deadline: float, timeout_s: float) -> dist.Store:
    """Open the store at the meeting point: the first rank keeps it unless the launcher does.

    Raises:
        NotMet: when the port is taken, or nobody listens there in time.
    """
    serves = seat.rank == 0 and not seat.hosted
    if not serves:
        _wait_for_port(seat, deadline, timeout_s)
    try:
        return dist.TCPStore(
            seat.host,
            seat.port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise NotMet(
            f"rank {seat.rank} on {platform.node()} cannot open port {seat.port}, which is in "
            f"use; choose another MASTER_PORT, or look for a second process with RANK 0."
        ) from None


def _absence(hosts: dict[int, str], world: int, timeout_s: float) -> str:
    """Return a sentence about the ranks that are absent; `hosts` are those of the others."""
    absent = sorted(set(range(world)) - set(hosts))
    here = ", ".join(
        f"{spell(rank for rank in hosts if hosts[rank] == host)} on {host}"
        for host in dict.fromkeys(hosts.values())
    )
    ranks = "ranks" if len(absent) > 1 else "rank"
    return (
        f"{ranks} {spell(absent)} of {world} did not arrive within {timeout_s:g} s; "
        f"those that did: {here}."
    )


def _wait_for_port(seat: Seat, deadline: float, timeout_s: float) -> None:
    """Wait until somebody listens at the meeting point, more quietly than torch does.

    Raises:
        NotMet: when none did in time.
    """
    while True:
        try:
            socket.create_connection((seat.host, seat.port), timeout=GRACE_S).close()
            return
        except OSError as problem:
            if time.monotonic() < deadline:
                time.sleep(POLL_S)
                continue
            raise NotMet(
                f"rank {seat.rank} on {platform.node()} did not reach {seat.host}:{seat.port} "
                f"within {timeout_s:g} s ({problem.strerror or problem}; {seat.host} means "
                f"{resolve(seat.host)} here); rank 0 must run there, and the port be open "
                f"between the machines."
            ) from None


def _gather(own: RankReport) -> list[RankReport]:
    """Return every rank's report, with clocks compared to that of rank 0."""
    ticks = []
    for _ in range(5):
        dist.barrier()
        ticks.append(time.time())
    everyone: list[tuple[RankReport, list[float]]] = [(own, ticks)] * dist.get_world_size()
    dist.all_gather_object(everyone, (own, ticks))
    _, first = everyone[0]
    # a rank that was kept waiting once looks late that time only
    return [
        replace(
            one,
            clock_s=min((mine - zero for mine, zero in zip(own, first, strict=True)), key=abs),
        )
        for one, own in everyone
    ]


def _time_sums(device: torch.device, group: dist.ProcessGroup | None = None) -> str:
    """Return how long sums over all ranks take, small and medium."""
    texts = []
    for elements, name in ((SMALL, "4 KiB"), (MEDIUM, "16 MiB")):
        tensor = torch.zeros(elements, device=device)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        took = statistics.median(seconds[1:])  # the first one connects
        rate = f" ({elements * 4 / took / 1e9:.1f} GB/s)" if elements == MEDIUM else ""
        texts.append(f"{name} in {took * 1e3:.2f} ms{rate}")
    return ", ".join(texts)


def _print_report(
    reports: Sequence[RankReport], times: Sequence[str], found: Sequence[str]
) -> None:
    console = PrintableConsole(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)
    console.print(_table(reports))
    first = reports[0]
    lines = [f"{name:18s} {value}" for name, value in first.versions.items()]
    lines += [f"{'all-reduce':18s} {line}" for line in times]
    lines += [f"remark: {sentence}" for sentence in remarks(reports)]
    lines += [f"difference: {sentence}" for sentence in found]
    hosts = len({one.host for one in reports})
    verdict = f"{len(found) or 'no'} difference{'s' if len(found) > 1 else ''}"
    lines.append(f"ranks {len(reports)}, machines {hosts}: {verdict}")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _table(reports: Sequence[RankReport]) -> Table:
    """Return a line for each group of ranks of a machine that see the same."""
    table = Table(*COLUMNS, title="Ranks, by machine", title_justify="left", box=SIMPLE)
    for host in dict.fromkeys(one.host for one in reports):
        lines: dict[tuple[str, ...], list[RankReport]] = {}
        for one in reports:
            if one.host == host:
                lines.setdefault(_cells(one), []).append(one)
        for number, (cells, ranks) in enumerate(lines.items()):
            clock = max((one.clock_s for one in ranks), key=abs)
            name = host if number == 0 else ""
            table.add_row(name, spell(r.rank for r in ranks), *cells, f"{clock:+z.1f} s")
        table.add_section()
    return table


def _cells(one: RankReport) -> tuple[str, ...]:
    return (
        f"{one.device_count} x {one.device}" if one.device_count else one.device,
        str(one.cores),
        str(one.threads),
        f"{one.memory_gib:.0f} GiB",
        f"{one.disk_gib:.0f} GiB",
        f"{one.shared_gib:.1f} GiB",
        "no limit" if one.open_files < 0 else str(one.open_files),
        one.master,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
