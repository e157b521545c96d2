"""One run, from its configuration to its exit code: check, build, restore, train."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from nemotron.checkpoint.read import read_model
from nemotron.device import find_device, measure_matmul_peak
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.model.adapter import is_adapter
from nemotron.model.build import build_on_meta, shapes
from nemotron.model.config import ModelConfig
from nemotron.model.flops import training_flops_per_token
from nemotron.model.hybrid import HybridLM
from nemotron.model.parameters import count_parameters
from nemotron.ops.apply import bind
from nemotron.ops.describe import choose_backends, describe
from nemotron.parallel.apply import LocalModel
from nemotron.parallel.runtime import Launch, Ranks, start
from nemotron.precision.apply import DTYPES
from nemotron.precision.policy import Assignment, assign, summarize
from nemotron.run.folder import RunFolder
from nemotron.run.log import RunLog
from nemotron.run.screen import Screen
from nemotron.run.signals import StopRequest
from nemotron.run.trackers import check_trackers
from nemotron.terminal import print_text
from nemotron.train.agreement import (
    check_agreement,
    facts_of_data,
    facts_of_start,
    facts_of_weights,
)
from nemotron.train.config import RunConfig
from nemotron.train.layout import check_layout, describe_ranks, least_world
from nemotron.train.loop import run
from nemotron.train.pretraining import Pretraining
from nemotron.train.reliability.deterministic import deterministic
from nemotron.train.reliability.watchdog import Watchdog
from nemotron.train.save import Saver
from nemotron.train.setup import Stage
from nemotron.train.tuning import trained_shares

ReadModel = Callable[[Path], tuple[ModelConfig, dict[str, Tensor]]]


def train(
    config: RunConfig,
    stage: Stage | None = None,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    recipe_path: str = "",
    read_initial: ReadModel = read_model,
    allow_changed: Sequence[str] = (),
) -> int:
    """Train as the recipe says, or go on from the run's newest whole checkpoint.

    `stage` trains such recipes; pre-training by default. `stop_at` ends the run after that step as
    a signal would. `read_initial` reads the weights that `init_from` names. `allow_changed` lists
    keys in which a resumed run may differ from its beginning. Returns the exit code: 0 done, 1
    failed, 75 stopped and can be resumed.

    Raises:
        UserError: when something that the user gave is wrong.
    """
    launch = Launch.of_this_process()
    trained: Stage = stage or Pretraining()
    plan = trained.plan(config)
    check_layout(config, plan, launch.world if launch else 1)
    check_trackers(config.logging.trackers)
    device = find_device(config.device, launch.local_rank if launch else None)
    folder = RunFolder(config.run_path, config)
    ranks = start(launch, device, config.parallel)
    check_agreement(facts_of_start(config, device, resume=resume), ranks)
    ranks.first(lambda: folder.check(plan.num_steps, resume=resume, allow_changed=allow_changed))
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(stop_at))
        screen = Screen(is_silent=not ranks.is_first)
        stack.callback(screen.close)
        log = RunLog(screen)
        is_on = config.reliability.deterministic
        stack.enter_context(deterministic(device, on=is_on))
        bind(config.ops)  # a backend that is not there is found before data is read
        own_peak = measure_matmul_peak(device, DTYPES[config.precision.compute])
        setup = trained.build(config, plan, device, sum(ranks.gather(own_peak)), ranks)
        stack.callback(setup.close)
        trainer = setup.trainer
        check_agreement(facts_of_data(trainer.batches.state()), ranks)
        stack.enter_context(folder.held(ranks))
        stack.enter_context(Watchdog(ranks, config.parallel, folder, trainer.progress))
        saver = Saver(trainer, folder, log)
        if not (resume and saver.restore()) and config.init_from is not None:
            load_initial(trainer.local, config.init_from, read_initial, ranks, seed=config.seed)
        return run(setup, folder, log, saver, stop, recipe_path)


def dry_run(config: RunConfig, stage: Stage | None = None) -> int:
    """Print what `train` would do, as far as it can be known without writing anything.

    Raises:
        UserError: as `train` does.
    """
    launch = Launch.of_this_process()
    trained: Stage = stage or Pretraining()
    plan = trained.plan(config)
    dims = check_layout(config, plan, launch.world if launch else least_world(config.parallel))
    check_trackers(config.logging.trackers)
    device = find_device(config.device)
    folder = RunFolder(config.run_path, config)
    folder.check(plan.num_steps, resume=True)
    model = build_on_meta(config.model)
    tokens = plan.timeline.num_tokens
    flops = training_flops_per_token(config.model, config.data.seq_len, config.num_depths) * tokens
    documents = config.data.reset_documents
    choices = choose_backends(config.ops, device, DTYPES[config.precision.compute], documents)
    tables = [table for _, _, table in _precision_tables(config, model, device)]
    formats = summarize(tables[0]) if config.precision.quantizes else []
    state = "exists, would go on by --resume" if folder.path.exists() else "new"
    for line in (
        f"run        {folder.path} ({state})",
        f"model      {count_parameters(config.model).line}",
        f"training   {plan.num_steps:,} steps, {tokens:,} tokens, {flops:.3g} FLOPs",
        *(f"tuning     {line}" for line in trained_shares(config.model, config.tuning)),
        *(f"operations {line}" for line in describe(choices)),
        *(f"precision  {line}" for line in formats),
        *(describe_ranks(config, plan, dims) if dims.world > 1 else ()),
    ):
        if launch is None or launch.rank == 0:
            print_text(line)
    return DONE


def describe_precision(config: RunConfig) -> list[str]:
    """Return the format of every linear layer at the start and after each switch, with reasons.

    Raises:
        UserError: when a rule fits no layer, or a named backend is not fit for one.
    """
    model = build_on_meta(config.model)
    lines = []
    for step, preset, table in _precision_tables(config, model):
        lines.append(f"from step {step}: preset {preset}")
        width = max((len(line.module) for line in table), default=0)
        lines += [
            f"  {line.module:<{width}}  {line.format:<11}  {line.backend:<7}  {line.kind}: "
            f"{line.reason}"
            for line in table
        ]
    return lines


def _precision_tables(
    config: RunConfig, model: HybridLM, device: torch.device | None = None
) -> Iterator[tuple[int, str, list[Assignment]]]:
    """Yield the table of formats at the start and after each switch, with its step and preset."""
    for step in (0, *(switch.step for switch in config.precision.switches)):
        preset = config.precision.preset_at(step)
        yield step, preset, assign(model, config.precision, preset, device)


def load_initial(
    local: LocalModel, path: str, read: ReadModel, ranks: Ranks | None = None, *, seed: int = 0
) -> None:
    """Start from saved weights; every tensor must be there, with its shape, and no other.

    `seed` is that of adapters, which begin anew.

    Raises:
        UserError: when they are not those of the recipe, or not those of another rank.
    """
    saved_config, weights = read(Path(path))
    if ranks is not None and ranks.world > 1:
        check_agreement(facts_of_weights(weights), ranks)
    own = shapes(local.config)
    problems = [f"{name} is absent" for name in own if name not in weights]
    problems += [f"{name} is not in the model" for name in weights if name not in own]
    problems += [
        f"{name} has shape {list(weights[name].shape)} instead of {list(shape)}"
        for name, shape in own.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        old, new = saved_config.model_dump(), local.config.model_dump()
        keys = [f"model.{key} = {old[key]} there" for key in old if old[key] != new[key]]
        raise UserError(
            f"has weights that do not fit the recipe ({', '.join(keys)}): "
            f"{'; '.join(problems[:10])}.",
            key="init_from",
            value=Path(path),
        )

    def value(name: str, shape: torch.Size, experts: range | None) -> Tensor:
        if is_adapter(name):
            return local.first_value(name, shape, seed, weights)
        return weights[name] if experts is None else weights[name][experts.start : experts.stop]

    local.fill(value)
