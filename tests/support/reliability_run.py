"""What one rank sees of steps that meet a fault."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.parallel.runtime import Ranks
from nemotron.parallel.shards import local_of
from nemotron.run.signals import StopRequest
from nemotron.train.config import PretrainConfig
from nemotron.train.loop import loop
from nemotron.train.pretraining import open_data, validate
from nemotron.train.profile import Profiler
from nemotron.train.reliability.replicas import ReplicasDiffer
from nemotron.train.setup import Setup
from nemotron.train.trainer import Trainer
from tests.support.tiny_run import build_trainer, do_step


def build(values: dict[str, Any]) -> Trainer:
    config = PretrainConfig.model_validate(values)
    return build_trainer(config, Ranks(dist.get_rank(), dist.get_world_size(), grouped=True))


def run_loop(trainer: Trainer, notes: "Notes", num_steps: int) -> None:
    data = open_data(trainer.config, trainer.plan)
    validate_all = (lambda: validate(trainer, data)) if data.validation_domains else None
    setup = Setup(trainer, data, validate_all)
    profiler = Profiler(trainer, trainer.config.run_path)
    loop(setup, notes, NothingSaved(), StopRequest(num_steps), profiler)


def skips(values: dict[str, Any], num_steps: int) -> list[tuple[str | None, bool]]:
    """Return of each step why it was skipped, and whether it left every tensor as it was."""
    trainer, results = build(values), []
    for step in range(num_steps):
        before = _copies(trainer)
        skip = do_step(trainer, step).skip
        after = _copies(trainer)
        same = all(torch.equal(before[name], after[name]) for name in before)
        results.append((skip and skip.name, same))
    return results


def compared(values: dict[str, Any], num_steps: int) -> tuple[int, str]:
    """Train, comparing replicas; returns the steps done and what was found."""
    trainer = build(values)
    try:
        run_loop(trainer, Notes(), num_steps)
    except ReplicasDiffer as problem:
        return trainer.state.step, str(problem)
    return trainer.state.step, ""


def logged(values: dict[str, Any], num_steps: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Train; returns what was logged, and the records of the steps."""
    trainer, notes = build(values), Notes()
    run_loop(trainer, notes, num_steps)
    return notes.lines, [r for r in notes.records if r["kind"] == "train"]


class Notes:
    """A log that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.info, self.record = self.lines.append, self.records.append


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
