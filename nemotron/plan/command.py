"""The command `nemotron plan`."""

import json

from nemotron.console import PrintableConsole
from nemotron.errors import UserError
from nemotron.exit_codes import DONE, FAILED
from nemotron.plan.build import constants_for, layout_of, main_stretch, read_setting
from nemotron.plan.hardware import find_hardware
from nemotron.plan.report import Report, as_json, describe_layout, nearest_published
from nemotron.plan.search import search as find_layouts
from nemotron.plan.tables import grids_of, show
from nemotron.plan.trace import trace_blocks
from nemotron.train.config import TextConfig


def plan(
    config: TextConfig,
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

    `efficiency` is the share of the peak that replaces the fitted time model;
    `tokens` is a length in place of the recipe's.

    Raises:
        UserError: when something that the user gave is wrong.
    """
    if efficiency is not None and not 0 < efficiency <= 1:
        raise UserError(f"--efficiency {efficiency:g} must lie above 0 and at most at 1.")
    if tokens is not None and not 0 < tokens < 1e30:
        raise UserError(f"--tokens {tokens:g} must be a number above 0, for example 25e12.")
    system = find_hardware(hardware, gpus)
    setting = read_setting(config, system)
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
        kept=trace_blocks(config.model, width) if check_memory else None,
    )
    if as_text:
        show(grids_of(report, constants), PrintableConsole())
    else:
        print(json.dumps(as_json(report), indent=2))
    return DONE if report.fits else FAILED
