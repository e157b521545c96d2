"""A run of a few steps in any layout, and what came out of it, put together from all ranks."""

import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.checkpoint.background import BackgroundSaver
from nemotron.checkpoint.find import newest
from nemotron.checkpoint.manifest import folder_name
from nemotron.checkpoint.write import CheckpointNotSaved, Content, save
from nemotron.data.loader import TrainingData, rows_of_rank
from nemotron.parallel.runtime import Ranks
from nemotron.parallel.shards import local_of, local_shards
from nemotron.train.config import PretrainConfig
from nemotron.train.layout import check_layout
from nemotron.train.pretraining import open_data, validate
from nemotron.train.schedule import plan_training
from nemotron.train.trainer import Trainer
from tests.support.tiny_run import build_trainer, do_step

Held = dict[str, tuple[torch.Size, dict[tuple[int, ...], Tensor]]]
"""Shape of the whole and pieces of it, by name."""


@dataclass
class Outcome:
    """What one rank saw."""

    losses: list[float] = field(default_factory=list)
    terms: list[dict[str, float]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    loads: list[dict[str, list[int]]] = field(default_factory=list)
    gradients: Held = field(default_factory=dict)
    """Of the first step."""
    weights: Held = field(default_factory=dict)
    """After the last."""
    validation: dict[str, float] = field(default_factory=dict)


def build(values: dict[str, Any]) -> Trainer:
    config = PretrainConfig.model_validate(values)
    ranks = Ranks()
    if dist.is_initialized():
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), grouped=True)
    check_layout(config, plan_training(config), ranks.world)
    return build_trainer(config, ranks)


def open_text(trainer: Trainer) -> TrainingData:
    return open_data(trainer.config, trainer.plan)


def run_steps(values: dict[str, Any], num_steps: int) -> Outcome:
    trainer = build(values)
    outcome = Outcome()
    for step in range(num_steps):
        result = do_step(trainer, step)
        outcome.losses.append(result.loss)
        outcome.terms.append(result.sums.values(result.counts))
        outcome.grad_norms.append(result.grad_norm)
        outcome.loads.append({n: load.tolist() for n, load in result.sums.load.items()})
        if step == 0:
            outcome.gradients = held(trainer, gradients=True)
    outcome.validation = validate(trainer, open_text(trainer))
    outcome.weights = held(trainer, gradients=False)
    forget_groups(trainer)
    return outcome


def forget_groups(trainer: Trainer) -> None:
    """End the groups of a trainer's mesh, each of which has threads of its own."""
    if trainer.mesh is not None:
        groups = [g for mesh in trainer.mesh._meshes for g in mesh.get_all_groups()]
        for group in groups:
            if group is not dist.group.WORLD and group in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(group)


def content_of(trainer: Trainer) -> Content:
    state = trainer.saved_state()
    return Content(trainer.state.step, trainer.tensors(), state, trainer.config.model)


def save_after(values: dict[str, Any], num_steps: int, folder: Path, background: bool) -> Held:
    """Train and save; returns what was saved of the model."""
    trainer = build(values)
    for step in range(num_steps):
        do_step(trainer, step)
    saved = held(trainer, gradients=False)
    content = content_of(trainer)
    if not background:
        save(folder, content, 3, trainer.ranks)
        return saved
    saver = BackgroundSaver(trainer.ranks)
    saver.start(folder, content, 3)
    do_step(trainer, num_steps)  # changes every tensor while the copies are written
    assert saver.step == num_steps
    done = saver.finish(wait=True)
    assert done is not None
    assert done.folder == folder / folder_name(num_steps)
    return saved


def load_and_go_on(values: dict[str, Any], folder: Path, num_steps: int) -> tuple[Held, list]:
    """Restore; returns what is in the model then, and the losses and rows of the next steps."""
    trainer = build(values)
    info = newest(folder, trainer.ranks).info
    assert info is not None
    trainer.restore(info)
    loaded = held(trainer, gradients=False)
    seen, data = [], open_text(trainer)
    for step in range(info.step, info.step + num_steps):
        readers = 1 if trainer.mesh is None else trainer.mesh.dims.batch
        rows = rows_of_rank(data.num_rows(step), trainer.local.batch_rank, readers)
        ids = data.sample_ids(step, rows)
        seen.append((do_step(trainer, step).loss, trainer.local.batch_rank, ids))
    return loaded, seen


def held(trainer: Trainer, *, gradients: bool) -> Held:
    found = {}
    for name, parameter in trainer.local.parameters().items():
        tensor = parameter.grad if gradients else parameter
        if tensor is None:
            continue
        whole = trainer.local.sharded(name, local_of(tensor).clone())
        found[name] = whole.shape, local_shards(whole)
    return found


def joined(parts: list[Held]) -> dict[str, Tensor]:
    """Put the ranks' pieces together; where several hold the same, it must be the same."""
    wholes: dict[str, Tensor] = {}
    for of_rank in parts:
        for name, (shape, pieces) in of_rank.items():
            whole = wholes.setdefault(name, torch.full(shape, torch.nan))
            for offsets, piece in pieces.items():
                at = tuple(
                    slice(low, low + size) for low, size in zip(offsets, piece.shape, strict=True)
                )
                known = ~whole[at].isnan()
                assert torch.equal(whole[at][known], piece[known]), f"{name}: ranks disagree"
                whole[at] = piece
    assert not [name for name, whole in wholes.items() if whole.isnan().any()]
    return wholes


def save_where_one_rank_has_no_room(values: dict[str, Any], folder: Path) -> tuple[str, float]:
    """Save, train on, and be refused; returns what was said and the loss of a step after that."""
    trainer = build(values)

    def write() -> None:
        save(folder, content_of(trainer), 2, trainer.ranks)

    do_step(trainer, 0)
    write()
    do_step(trainer, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        write()
    except CheckpointNotSaved as problem:
        said = str(problem)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return said, do_step(trainer, 2).loss


def find(folder: Path) -> tuple[int | None, tuple[str, ...]]:
    """Return the step of the newest whole checkpoint, and what was passed over."""
    found = newest(folder, Ranks(dist.get_rank(), dist.get_world_size(), grouped=True))
    return found.info and found.info.step, tuple(str(skipped) for skipped in found.skipped)
