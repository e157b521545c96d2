"""What one rank sees of its machine, and which properties must agree between ranks."""

import os
import platform
import resource
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from nemotron.device import GIB
from nemotron.doctor.machine import PACKAGES
from nemotron.run.provenance import collect

MOST_SKEW_S = 1.0
"""Clocks further apart make the order of log lines and files useless."""

FEW_FILES = 4096
"""Shards, sockets to every other rank and checkpoint files are open at the same time."""

LITTLE_SHARED_GIB = 1.0
"""NCCL keeps its buffers between the ranks of a machine in shared memory."""


@dataclass(frozen=True)
class RankReport:
    """One rank's view; `clock_s` is how far its clock is ahead of rank 0's."""

    rank: int
    local_rank: int
    host: str
    device: str
    device_id: str
    """Identifies the GPU in the whole world; empty without one."""
    device_count: int
    cores: int
    threads: int
    open_files: int
    memory_gib: float
    disk_gib: float
    shared_gib: float
    master: str
    """What the name of rank 0's machine means here."""
    versions: dict[str, str]
    clock_s: float = 0.0


def report(rank: int, local_rank: int, master: str) -> RankReport:
    """Look at this machine as the given rank, of which `master` names the first."""
    device, device_id = "cpu", ""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank < count:
        found = torch.cuda.get_device_properties(local_rank)
        device = f"{found.name}, {found.total_memory / GIB:.0f} GiB"
        device_id = str(found.uuid)
    elif count:
        device = "none"
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    pages = os.sysconf("SC_PHYS_PAGES")
    return RankReport(
        rank=rank,
        local_rank=local_rank,
        host=platform.node(),
        device=device,
        device_id=device_id,
        device_count=count,
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        open_files=-1 if files == resource.RLIM_INFINITY else files,
        memory_gib=pages * os.sysconf("SC_PAGE_SIZE") / 2**30,
        disk_gib=_free_gib(Path.cwd()),
        shared_gib=_free_gib(Path("/dev/shm")),
        master=resolve(master),
        versions=_versions(),
    )


def resolve(name: str) -> str:
    """Return the address of a host, or why there is none."""
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        return f"unknown ({error.strerror or error})"


def differences(reports: Sequence[RankReport]) -> Iterator[str]:
    """Yield one sentence for each thing in which the ranks do not fit together."""
    yield from _unequal("The device", reports, lambda r: r.device)
    for name in dict.fromkeys(name for one in reports for name in one.versions):
        yield from _unequal(name, reports, _version(name))
    yield from _unequal("The number of GPUs that a rank sees", reports, lambda r: r.device_count)
    yield from _unequal("The number of cores", reports, lambda r: r.cores)
    yield from _unequal("The number of threads", reports, lambda r: r.threads)
    yield from _unequal("The limit of open files", reports, lambda r: _limit(r.open_files))
    for one in reports:
        if one.device_count and not one.device_id:
            yield (
                f"Rank {one.rank} on {one.host} has LOCAL_RANK {one.local_rank}, but sees "
                f"{one.device_count} GPUs; let every rank of a machine see all of its GPUs."
            )
    for ranks in _groups(reports, lambda r: (r.host, r.device_id)).values():
        if len(ranks) > 1 and ranks[0].device_id:
            yield (
                f"Ranks {spell(r.rank for r in ranks)} on {ranks[0].host} use the same GPU; "
                f"give each its own LOCAL_RANK."
            )
    early = min(reports, key=lambda r: r.clock_s)
    late = max(reports, key=lambda r: r.clock_s)
    if late.clock_s - early.clock_s > MOST_SKEW_S:
        yield (
            f"The clock of rank {late.rank} on {late.host} is {late.clock_s - early.clock_s:.1f} s "
            f"ahead of that of rank {early.rank} on {early.host}; synchronize them."
        )


def remarks(reports: Sequence[RankReport]) -> Iterator[str]:
    """Yield one sentence for each thing that is the same everywhere and yet worth a change."""
    if few := [r for r in reports if 0 <= r.open_files < FEW_FILES]:
        yield (
            f"{_ranks(few)} may open {few[0].open_files} files at a time, "
            f"which is low; raise the limit (ulimit -n)."
        )
    if little := [r for r in reports if r.device_id and r.shared_gib < LITTLE_SHARED_GIB]:
        yield (
            f"{_ranks(little)} found {little[0].shared_gib:.2f} GiB free in /dev/shm, which is "
            f"little for NCCL; give the container more (--shm-size or --ipc=host)."
        )


def spell(ranks: Iterable[int]) -> str:
    """Return ranks as in `0-3, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _unequal(
    what: str, reports: Sequence[RankReport], value: Callable[[RankReport], object]
) -> Iterator[str]:
    groups = _groups(reports, value)
    if len(groups) > 1:
        parts = [f"{key} on {_ranks(ranks).lower()}" for key, ranks in groups.items()]
        yield f"{what} differs: {'; '.join(parts)}."


def _version(name: str) -> Callable[[RankReport], object]:
    return lambda report: report.versions.get(name, "missing")


def _ranks(reports: Sequence[RankReport]) -> str:
    return f"Rank{'s' if len(reports) > 1 else ''} {spell(r.rank for r in reports)}"


def _groups(
    reports: Sequence[RankReport], value: Callable[[RankReport], object]
) -> dict[object, list[RankReport]]:
    groups: dict[object, list[RankReport]] = {}
    for one in reports:
        groups.setdefault(value(one), []).append(one)
    return groups


def _versions() -> dict[str, str]:
    facts = collect(torch.device("cpu"))
    found = {"python": platform.python_version(), "nemotron": facts["code"]["nemotron-train"]}
    if "commit" in facts["code"]:
        changed = " with changes" if facts["code"]["uncommitted_changes"] else ""
        found["commit"] = facts["code"]["commit"][:12] + changed
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _free_gib(path: Path) -> float:
    try:
        return shutil.disk_usage(path).free / 2**30
    except OSError:
        return 0.0


def _limit(files: int) -> str:
    return "none" if files < 0 else str(files)
