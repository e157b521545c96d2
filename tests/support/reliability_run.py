"""What one rank sees of steps that meet a fault."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.parallel.apply import local_of
from nemotron.parallel.runtime import Ranks
from nemotron.run.signals import StopRequest
from nemotron.train.config import PretrainConfig
from nemotron.train.loop import loop
from nemotron.train.loss import PretrainObjective
from nemotron.train.reliability.replicas import ReplicasDiffer
from nemotron.train.schedule import plan_course
from nemotron.train.start import open_data
from nemotron.train.trainer import Trainer


def build_trainer(values: dict[str, Any]) -> Trainer:
    config = PretrainConfig.model_validate(values)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), grouped=True)
    course = plan_course(config)
    data = open_data(config, course)
    objective = PretrainObjective.of(config.model, config.loss)
    return Trainer(config, objective, course, data, torch.device("cpu"), 1e9, ranks)


def skips(values: dict[str, Any], num_steps: int) -> list[tuple[str | None, bool]]:
    """Return of each step why it was skipped, and whether it left every tensor as it was."""
    trainer, results = build_trainer(values), []
    for step in range(num_steps):
        before = _copies(trainer)
        skip = trainer.train_step(step).skip
        after = _copies(trainer)
        same = all(torch.equal(before[name], after[name]) for name in before)
        results.append((skip and skip.name, same))
    return results


def compared(values: dict[str, Any], num_steps: int) -> tuple[int, str]:
    """Train, comparing replicas; returns the steps done and what was found."""
    trainer = build_trainer(values)
    try:
        loop(trainer, Notes(), NothingSaved(), StopRequest(num_steps))
    except ReplicasDiffer as problem:
        return trainer.state.step, str(problem)
    return trainer.state.step, ""


def told(values: dict[str, Any], num_steps: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Train; returns what was told, and the records of the steps."""
    trainer, notes = build_trainer(values), Notes()
    loop(trainer, notes, NothingSaved(), StopRequest(num_steps))
    return notes.lines, [r for r in notes.records if r["kind"] == "train"]


class Notes:
    """A log that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.tell, self.record = self.lines.append, self.records.append


class NothingSaved:
    """A saver of runs that leave nothing."""

    def save_or_warn(self) -> None:
        pass

    def finish_or_warn(self, *, wait: bool) -> None:
        pass


def _copies(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {n: local_of(p).clone() for n, p in trainer.local.parameters().items()}
    tensors |= {n: b.clone() for n, b in trainer.local.buffers().items()}
    for key, moments in trainer.optimizer.tensors().items():
        tensors |= {f"{key}.{n}": moment.clone() for n, moment in moments.items()}
    return tensors
