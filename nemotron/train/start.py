"""One run, from its configuration to its exit code: check, build, restore, train."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch

from nemotron.checkpoint.manifest import steps
from nemotron.device import find_device, matmul_peak
from nemotron.exit_codes import DONE
from nemotron.model.build import build_on_meta
from nemotron.model.flops import training_flops_per_token
from nemotron.model.hybrid import HybridLM
from nemotron.model.parameters import count_parameters
from nemotron.ops.adamw import kernel_for
from nemotron.ops.apply import bind
from nemotron.ops.describe import choose_backends, describe
from nemotron.parallel.runtime import Launch, start
from nemotron.precision.apply import DTYPES
from nemotron.precision.policy import Assignment, assign, summarize
from nemotron.run.folder import RunFolder, holds_run
from nemotron.run.log import RunLog
from nemotron.run.provenance import Facts
from nemotron.run.screen import Screen
from nemotron.run.signals import StopRequest
from nemotron.run.trackers import check_trackers
from nemotron.terminal import print_text
from nemotron.train.agreement import (
    check_agreement,
    facts_of_data,
    facts_of_start,
)
from nemotron.train.config import RunConfig
from nemotron.train.initial import (
    ReadModel,
    keep_companions,
    load_initial,
    read_checkpoint,
    read_fitting,
)
from nemotron.train.layout import check_layout, describe_ranks, least_world
from nemotron.train.loop import run
from nemotron.train.pretraining import Pretraining
from nemotron.train.profile import check_profile
from nemotron.train.reliability.deterministic import deterministic
from nemotron.train.reliability.watchdog import Watchdog
from nemotron.train.save import Saver
from nemotron.train.setup import Stage
from nemotron.train.tuning import trained_shares


def train(
    config: RunConfig,
    stage: Stage | None = None,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    origin: Facts | None = None,
    read_initial: ReadModel = read_checkpoint,
    allow_changed: Sequence[str] = (),
    panel: bool | None = None,
) -> int:
    """Train by the recipe, or continue from the run's newest complete checkpoint.

    `stage` trains such recipes; pre-training by default. `stop_at` ends the run after that step as
    a signal would. `origin` says where the recipe comes from; provenance keeps it.
    `read_initial` reads the weights that `init_from` names. `allow_changed` lists
    keys in which a resumed run may differ from its beginning. `panel` says whether steps are shown
    as a panel or as lines; by default the terminal decides. Returns the exit code: 0 done, 1
    failed, 75 stopped and can be resumed.

    Raises:
        UserError: when something that the user gave is wrong.
    """
    stop = StopRequest(stop_at, **config.stop.model_dump())
    launch = Launch.of_this_process()
    trained: Stage = stage or Pretraining()
    plan = trained.plan(config)
    world = launch.world if launch else 1
    check_layout(config, plan, world)
    check_profile(config.profile, plan.num_steps, world)
    check_trackers(config.logging.trackers)
    device = find_device(config.device, launch.local_rank if launch else None)
    folder = RunFolder(config.run_path, config)
    ranks = start(launch, device, config.parallel)
    check_agreement(facts_of_start(config, device, resume=resume), ranks)
    ranks.first(lambda: folder.check(plan.num_steps, resume=resume, allow_changed=allow_changed))
    with stop, ExitStack() as stack:
        screen = Screen(is_silent=not ranks.is_first, panel=panel)
        stack.callback(screen.close)
        stop.say = screen.say_at_once
        log = RunLog(screen)
        is_on = config.reliability.deterministic
        stack.enter_context(deterministic(device, on=is_on))
        bind(config.ops)  # a backend that is not there is found before data is read
        own_peak = matmul_peak(device, DTYPES[config.precision.compute])
        setup = trained.build(config, plan, device, sum(ranks.gather(own_peak)), ranks)
        stack.callback(setup.close)
        trainer = setup.trainer
        check_agreement(facts_of_data(trainer.batches.state()), ranks)
        stack.enter_context(folder.held(ranks))
        stack.enter_context(Watchdog(ranks, config.parallel, folder, trainer.progress))
        saver = Saver(trainer, folder, log)
        if not (resume and saver.restore()) and config.init_from is not None:
            initial = load_initial(
                trainer.local, config.init_from, read_initial, ranks, seed=config.seed
            )
            ranks.first(lambda: keep_companions(initial, setup.content.tokenizer, folder, log))
        return run(setup, folder, log, saver, stop, origin or {})


def dry_run(
    config: RunConfig,
    stage: Stage | None = None,
    *,
    resume: bool = False,
    read_initial: ReadModel = read_checkpoint,
    allow_changed: Sequence[str] = (),
    estimate: Callable[[RunConfig], list[str]] = lambda _: [],
) -> int:
    """Print what `train` would do, as far as it can be known without writing anything.

    The data, the tokenizer and the weights of `init_from` are read for it. `estimate` returns
    lines about memory and time.

    Raises:
        UserError: as `train` does.
    """
    launch = Launch.of_this_process(meets=False)
    trained: Stage = stage or Pretraining()
    plan = trained.plan(config)
    world = launch.world if launch else least_world(config.parallel)
    dims = check_layout(config, plan, world)
    check_profile(config.profile, plan.num_steps, world)
    check_trackers(config.logging.trackers)
    device = find_device(config.device)
    folder = RunFolder(config.run_path, config)
    folder.check(plan.num_steps, resume=True, allow_changed=allow_changed)
    folder.check_place()
    model = build_on_meta(config.model)
    tokens = plan.timeline.num_tokens
    flops = training_flops_per_token(config.model, config.data.seq_len, config.num_depths) * tokens
    documents = config.data.reset_documents
    choices = choose_backends(config.ops, device, DTYPES[config.precision.compute], documents)
    kernel_for(config.optimizer.kernel, device)
    tables = [table for _, _, table in _precision_tables(config, model, device)]
    formats = summarize(tables[0]) if config.precision.quantizes else []
    if launch is not None and launch.rank > 0:
        return DONE
    for line in (
        f"run        {folder.path} ({_prospect(folder, plan.num_steps, resume=resume)})",
        f"model      {count_parameters(config.model).line}",
        f"training   {plan.num_steps:,} steps, {tokens:,} tokens, {flops:.3g} FLOPs",
        *(f"tuning     {line}" for line in trained_shares(config.model, config.tuning)),
        *(f"operations {line}" for line in describe(choices)),
        *(f"precision  {line}" for line in formats),
        *(describe_ranks(config, plan, dims) if dims.world > 1 else ()),
        *estimate(config),
    ):
        print_text(line)
    if config.init_from is not None:
        read_fitting(config.model, config.init_from, read_initial)
        print_text(f"weights    every tensor of {config.init_from} fits")
    for line in trained.rehearse(config, plan):
        print_text(f"data       {line}")
    return DONE


def _prospect(folder: RunFolder, num_steps: int, *, resume: bool) -> str:
    """Say what would become of the run in a folder."""
    done = max(steps(folder.checkpoints), default=0)
    if not holds_run(folder):
        return "new"
    if done >= num_steps:
        return f"finished, {done} steps"
    return (
        f"would go on at step {done} of {num_steps}"
        if resume
        else f"exists, at step {done} of {num_steps}; would go on with --resume"
    )


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
