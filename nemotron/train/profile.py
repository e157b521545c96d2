"""Recording chosen steps: a trace, a snapshot of memory, and where the time of the layers went."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from nemotron.device import synchronize
from nemotron.errors import UserError
from nemotron.model.block import Block
from nemotron.model.config import LAYER_KINDS
from nemotron.model.hybrid import HybridLM
from nemotron.train.config import ProfileConfig
from nemotron.train.profile_table import MARK, PREDICTION, Seconds, attribute, report
from nemotron.train.trainer import Trainer

log = logging.getLogger(__name__)


class Profiler:
    """Records what the recipe asks for of the steps of one rank."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self._trainer, self._folder = trainer, folder
        config, rank = trainer.config.profile, trainer.ranks.rank
        self._steps = frozenset(config.steps) if rank in config.ranks else frozenset()
        self._on_gpu = trainer.device.type == "cuda"
        self._seconds: list[Seconds] = []
        self._tokens = 0

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Record the step with this index if it is a chosen one."""
        if step + 1 not in self._steps:
            yield
            return
        config, rank = self._trainer.config.profile, self._trainer.ranks.rank
        name = f"step-{step + 1:08d}-rank-{rank}"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * self._on_gpu)]
        # else the profiler writes lines of its own between those of the run
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        has_snapshot = config.memory and self._on_gpu
        if has_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        before = self._trainer.state.tokens
        with (
            _named_layers(self._trainer.local.models),
            profile(activities=activities, profile_memory=config.memory) as recorded,
        ):
            yield
            synchronize(self._trainer.device)
            # other ranks wait meanwhile, as in any part of a step
            self._trainer.progress.enter(step, "profile")
        self._tokens += self._trainer.state.tokens - before
        self._seconds.append(attribute(recorded.events() or [], on_gpu=self._on_gpu))
        try:
            self._folder.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            if has_snapshot:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}-memory.pickle"))
        except OSError as error:
            log.warning("warning: the profile of step %d is not kept: %s", step + 1, error)
        finally:
            if has_snapshot:
                torch.cuda.memory._record_memory_history(enabled=None)

    def table(self) -> list[str]:
        """Return the lines that say where the time went; none where nothing was recorded."""
        if not self._seconds:
            return []
        config, trainer = self._trainer.config, self._trainer
        where = f"rank {trainer.ranks.rank} of {trainer.ranks.world}"
        lines = report(
            config.model,
            config.data.seq_len,
            config.num_depths,
            self._tokens // len(self._seconds),
            self._seconds,
        )
        return [f"profile    {where}; traces in {self._folder}", *lines]


def check_profile(config: ProfileConfig, num_steps: int, world: int) -> None:
    """Check that a run of so many steps and ranks has the steps and ranks to record.

    Raises:
        UserError: when a step or a rank is not.
    """
    if config.steps and max(config.steps) > num_steps:
        rule = f"has a step after the last one; give steps from 1 to {num_steps}."
        raise UserError(rule, key="profile.steps", value=list(config.steps))
    if max(config.ranks) >= world:
        rule = f"has a rank that is not there; give ranks from 0 to {world - 1}."
        raise UserError(rule, key="profile.ranks", value=list(config.ranks))


@contextmanager
def _named_layers(models: Sequence[HybridLM]) -> Iterator[None]:
    """Mark the forward passes of the layers by their kinds, for the trace and the table."""
    with ExitStack() as stack:
        for model in models:
            for module in model.modules():
                if (kind := _kind_of(module, model)) is not None:
                    _mark(module, kind, stack)
        yield


def _kind_of(module: nn.Module, model: HybridLM) -> str | None:
    if module is model.mtp:
        return PREDICTION
    return LAYER_KINDS[module.letter] if isinstance(module, Block) else None


def _mark(module: nn.Module, kind: str, stack: ExitStack) -> None:
    marks: list[Any] = []  # Any: torch does not type what it records

    def begin(*_: object) -> None:
        marks.append(record_function(MARK + kind))
        marks[-1].__enter__()

    def end(*_: object) -> None:
        marks.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(begin).remove)
    stack.callback(module.register_forward_hook(end, always_call=True).remove)
