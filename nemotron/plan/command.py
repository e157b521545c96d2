"""The command `nemotron plan`."""

import json
import math

import torch

from nemotron.console import PrintableConsole
from nemotron.device import GIB, find_device
from nemotron.errors import UserError
from nemotron.exit_codes import DONE, FAILED
from nemotron.model.parameters import count_parameters
from nemotron.parallel.runtime import Launch
from nemotron.plan.build import constants_for, layout_of, main_stretch, read_setting
from nemotron.plan.hardware import SYSTEMS, find_hardware
from nemotron.plan.report import DAY, Report, as_json, describe_layout, nearest_published
from nemotron.plan.search import search as find_layouts
from nemotron.plan.tables import grids_of, show
from nemotron.plan.trace import trace_blocks
from nemotron.terminal import print_text
from nemotron.train.config import RunConfig, TextConfig
from nemotron.train.layout import least_world
from nemotron.train.schedule import TrainingPlan, plan_training


def plan(
    config: RunConfig,
    training: TrainingPlan,
    *,
    gpus: int,
    hardware: str,
    search: bool = False,
    efficiency: float | None = None,
    check_memory: bool = False,
    tokens: float | None = None,
    as_text: bool = True,
) -> int:
    """Print the predicted cost of a recipe's layout; returns 1 if it breaks a rule or does not fit.

    Of reinforcement learning these are the updates, for `training` steps of full rows.
    `efficiency` is the share of the peak that replaces the fitted time model;
    `tokens` is a length in place of the recipe's.

    Raises:
        UserError: when something that the user gave is wrong.
    """
    if efficiency is not None and not 0 < efficiency <= 1:
        rule = "must lie above 0 and at most at 1; give for example 0.4."
        raise UserError(rule, key="--efficiency", value=f"{efficiency:g}")
    if tokens is not None and not 0 < tokens < 1e30:
        rule = "must be a number above 0, for example 25e12."
        raise UserError(rule, key="--tokens", value=f"{tokens:g}")
    system = find_hardware(hardware, gpus)
    setting = read_setting(config, training, system)
    constants = constants_for(system, efficiency)
    stretch = main_stretch(list(setting.stretches))
    dims, violations = layout_of(setting, gpus)
    flops = sum(value for _, value in setting.formats[stretch.seq_len])
    width = 4 if config.precision.compute == "fp32" else 2
    legal = None if violations else dims
    report = Report(
        setting,
        gpus,
        stretch,
        violations,
        layout=describe_layout(setting, legal, constants, tokens) if legal else None,
        compared=nearest_published(setting, flops),
        found=find_layouts(setting, gpus, constants) if search else None,
        kept=trace_blocks(config.model, width, config.recomputed_operations)
        if check_memory
        else None,
    )
    if as_text:
        show(grids_of(report, constants), PrintableConsole())
        for line in _not_predicted(config):
            print_text(line)
    else:
        print(json.dumps(as_json(report), indent=2))
    return DONE if report.fits else FAILED


def _not_predicted(config: RunConfig) -> list[str]:
    """Return lines about work that is not predicted."""
    if config.stage != "rl":
        return []
    whole = 4 * count_parameters(config.model).total / GIB
    return [
        "Rollouts are not predicted. With several ranks each of them holds the whole model once "
        f"more for them, in float32: {whole:,.1f} GiB."
    ]


def estimate(config: RunConfig) -> list[str]:
    """Return lines that predict memory and time on this machine; none where it is not known.

    On GPUs without a row in `SYSTEMS`, and for stages other than pre-training, nothing is known.
    """
    launch = Launch.of_this_process(meets=False)
    name = _name_of_this(find_device(config.device))
    if name is None or not isinstance(config, TextConfig) or (launch and launch.rank):
        return []
    world = launch.world if launch else least_world(config.parallel)
    system = find_hardware(name, world)
    setting = read_setting(config, plan_training(config), system)
    dims, violations = layout_of(setting, world)
    if violations:
        return []
    constants = constants_for(system, None)
    layout = describe_layout(setting, dims, constants, None)
    need, there = layout.memory.total / GIB, system.memory / GIB
    enough = "of the" if need <= there else "more than the"
    days = sum(cost.days for cost in layout.costs)
    tokens_s = layout.prediction.tokens_per_second
    ranks = f" on each of {world} ranks" if world > 1 else ""
    return [
        f"memory     about {need:,.1f} GiB{ranks}, {enough} {there:,.1f} GiB here",
        f"time       about {_duration(days)}, {tokens_s:,.0f} tokens/s: predicted by nemotron plan "
        f"for {'this processor' if name == 'cpu' else name}",
    ]


def _name_of_this(device: torch.device) -> str | None:
    """Return the name of this machine's system."""
    if device.type == "cpu":
        return "cpu"
    words = torch.cuda.get_device_name(device).lower().split()
    return next((word for word in words if word in SYSTEMS), None)


def _duration(days: float) -> str:
    """Return a time in the unit that fits it."""
    for unit, length in (("days", 1.0), ("hours", 24.0), ("minutes", 24 * 60.0)):
        if days * length >= 1.5:
            return f"{days * length:,.1f} {unit}"
    return f"{math.ceil(days * DAY):,} seconds"
