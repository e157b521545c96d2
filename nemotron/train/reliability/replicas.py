"""Comparing, bit by bit, the tensors that several ranks must hold alike."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.model.build import build_on_meta
from nemotron.parallel.local import LocalModel
from nemotron.parallel.runtime import Ranks
from nemotron.parallel.shards import local_of
from nemotron.parallel.stages import shared_parameters
from nemotron.train.optimizer import Optimizer

CHUNK = 1 << 22
"""Elements that are widened to 64 bits at a time."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NUM_NAMED = 5
"""Tensors that a sentence about differences names."""


class ReplicasDiffer(Exception):
    """Tensors that must be alike are not; says which, on which ranks, after which step."""


@dataclass(frozen=True)
class Replicas:
    """Tensors that every rank of a group holds alike; on each rank, in the same order."""

    group: dist.ProcessGroup | None
    """Absent: all ranks."""
    tensors: dict[str, Tensor | None]
    """What is here, by name; None for what only other ranks hold."""


class ReplicaCheck:
    """Finds what a rank holds alike with others, once; compares it when asked."""

    def __init__(self, local: LocalModel, optimizer: Optimizer, ranks: Ranks) -> None:
        self._ranks, self._device = ranks, local.device
        self._sets = _find(local, optimizer)
        self._last = -1

    def __call__(self, step: int) -> None:
        """Compare after so many steps, unless that was done.

        Raises:
            ReplicasDiffer: on every rank.
        """
        if step == self._last or not self._sets:
            return
        self._last = step
        sums = [_checksums(s.tensors, self._device) for s in self._sets]
        wrong = [self._differs(s, own) for s, own in zip(self._sets, sums, strict=True)]
        count = torch.stack([w.sum() for w in wrong]).sum()
        if not self._ranks.sum(count).item():
            return
        found = {
            name: checksum
            for replicas, own, is_wrong in zip(self._sets, sums, wrong, strict=True)
            for name, checksum, bad in zip(
                replicas.tensors, own.tolist(), is_wrong.tolist(), strict=True
            )
            if bad and replicas.tensors[name] is not None
        }
        raise ReplicasDiffer(_sentence(step, self._ranks.gather(found)))

    def _differs(self, replicas: Replicas, own: Tensor) -> Tensor:
        """Say of each tensor whether two ranks of the group have different checksums."""
        limits = torch.iinfo(torch.int64)
        absent = torch.tensor(
            [tensor is None for tensor in replicas.tensors.values()], device=own.device
        )
        low, high = own.masked_fill(absent, limits.max), own.masked_fill(absent, limits.min)
        dist.all_reduce(low, dist.ReduceOp.MIN, group=replicas.group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=replicas.group)
        return low != high


def checksum(tensor: Tensor) -> Tensor:
    """Return a 64-bit sum of a tensor's bits, each element times an odd number of its place.

    Integer sums are exact and wrap around, so the order of adding does not matter, and any one
    changed element changes the result. It stays on the device.
    """
    bits = tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=part.device)
        total += (part * (2 * places + 1)).sum()
    return total


def _checksums(tensors: Mapping[str, Tensor | None], device: torch.device) -> Tensor:
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return torch.stack([zero if t is None else checksum(t).to(device) for t in tensors.values()])


def _find(local: LocalModel, optimizer: Optimizer) -> list[Replicas]:
    """Return, set by set, what ranks hold alike: over `tp`, copies, ends of a pipeline, all."""
    if local.mesh is None:
        return []
    mesh, moments = local.mesh, optimizer.tensors()

    def of(names: list[str]) -> dict[str, Tensor | None]:
        tensors: dict[str, Tensor | None] = {}
        for name in names:
            tensors[name] = local_of(local.parameter(name))
            for key, named in moments.items():
                if key != "step" and name in named:
                    tensors[f"{key} of {name}"] = named[name]
        return tensors

    sets = []
    if mesh.dims.tp > 1 and local.partial:
        sets.append(Replicas(mesh.group("tp"), of(sorted(local.partial))))
    if mesh.dims.dp_replicate > 1:
        sets.append(Replicas(mesh.group("dp_replicate"), of(sorted(local.parameters()))))
    if mesh.ends is not None and (shared := shared_parameters(local.config)):
        sets.append(Replicas(mesh.ends, of(list(shared))))
    names = [name for name, _ in build_on_meta(local.config).named_buffers()]
    if names:  # those of layers on other stages of a pipeline are not here
        sets.append(Replicas(None, {name: local.buffers().get(name) for name in names}))
    return sets


def _sentence(step: int, found: list[dict[str, int]]) -> str:
    """Name the tensors that differ, and which ranks agree with which."""
    holders: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, checksums in enumerate(found):
        for name, value in checksums.items():
            holders[name][value].append(rank)
    parts = []
    for name, by_value in list(holders.items())[:NUM_NAMED]:
        sides = (f"rank {', '.join(map(str, ranks))}" for ranks in by_value.values())
        parts.append(f"{name} ({' against '.join(sides)})")
    more = f", and {len(holders) - NUM_NAMED} more" if len(holders) > NUM_NAMED else ""
    return f"after step {step} ranks hold different bits of {'; '.join(parts)}{more}"
