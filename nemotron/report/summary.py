"""A run in a few numbers, the same on the page, in the list and in the comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemotron.drawing.scale import short
from nemotron.report.run import Run
from nemotron.report.table import Table

SMOOTHED = 20
"""Newest records whose mean is the last loss: a single step is noisy."""


@dataclass(frozen=True)
class Best:
    """The best validation of a run."""

    name: str
    value: float
    step: int

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4f} at step {self.step}"


@dataclass(frozen=True)
class Row:
    """A figure of each run; None where a run does not have it."""

    name: str
    values: list[float | None]
    texts: list[str]
    form: str
    """How the values are written."""
    note: str = ""
    """Where the value of the first run is from."""


def best_validation(table: Table) -> Best | None:
    """Return the highest reward, or the lowest loss, and the step of it."""
    for key, name, sign in (("validation/reward", "reward", -1), ("validation/loss", "loss", 1)):
        series = table.series(key).finite
        if len(series.y):
            place = int(np.argmin(sign * series.y))
            return Best(name, float(series.y[place]), int(series.x[place]))
    return None


def last_loss(table: Table) -> float | None:
    """Return the mean loss of the newest records."""
    for key in ("loss/main", "loss/total"):
        values = table.series(key).finite.y
        if len(values):
            return float(values[-SMOOTHED:].mean())
    return None


def median(table: Table, key: str) -> float | None:
    """Return the median of a key, which slow first steps do not move."""
    values = table.series(key).finite.y
    return float(np.median(values)) if len(values) else None


def largest(table: Table, key: str) -> float | None:
    """Return the largest value of a key."""
    values = table.series(key).finite.y
    return float(values.max()) if len(values) else None


def progress(run: Run) -> str:
    """Say how far a run is."""
    return f"{run.step:,}" if run.num_steps is None else f"{run.step:,} of {run.num_steps:,}"


def rows(runs: Sequence[Run]) -> list[Row]:
    """Return the figures that at least one of the runs has."""
    best = [best_validation(run.validation) for run in runs]
    found = [
        _row("last loss", [last_loss(run.train) for run in runs], ".4f"),
        Row(
            "best validation",
            [None if one is None else one.value for one in best],
            ["" if one is None else str(one) for one in best],
            ".4f",
        )
        if len(runs) > 1
        else _alone(best[0]),
        *_common(runs),
        *_domains(runs),
        _row("tokens", [run.train.last("data/tokens") for run in runs], ",.0f"),
        _row("tokens per second", [median(run.train, "perf/tokens_per_s") for run in runs], ",.0f"),
        _row("MFU", [median(run.train, "perf/mfu") for run in runs], ".1%"),
        _row("seconds a step", [median(run.train, "perf/step_s") for run in runs], ".3g"),
        _row("peak memory, GiB", [largest(run.train, "mem/peak_gib") for run in runs], ".2f"),
        _row("GPU memory, GiB", [largest(run.train, "mem/gpu_peak_gib") for run in runs], ".2f"),
        _row("skipped steps", [run.train.last("skipped_steps") for run in runs], ",.0f"),
    ]
    return [row for row in found if any(value is not None for value in row.values)]


def _alone(best: Best | None) -> Row:
    if best is None:
        return Row("best validation", [None], [""], "")
    return Row(
        f"best validation {best.name}",
        [best.value],
        [f"{best.value:.4f}"],
        ".4f",
        f"at step {best.step:,}",
    )


def _row(name: str, values: list[float | None], form: str) -> Row:
    return Row(
        name, values, ["" if value is None else format(value, form) for value in values], form
    )


def _common(runs: Sequence[Run]) -> list[Row]:
    """Return the validation at the newest step at which every run has one, if they end apart."""
    if len(runs) == 1:
        return []
    key = "validation/loss"
    if not all(len(run.validation.series(key).y) for run in runs):
        key = "validation/reward"
    known = []
    for run in runs:
        series = run.validation.series(key).finite
        known.append(dict(zip(series.x.tolist(), series.y.tolist(), strict=True)))
    common = set.intersection(*(set(values) for values in known))
    if not common or all(max(values) == max(common) for values in known):
        return []
    step = max(common)
    return [_row(f"validation at step {short(step)}", [one[step] for one in known], ".4f")]


def _domains(runs: Sequence[Run]) -> list[Row]:
    names = dict.fromkeys(
        key
        for run in runs
        for key in run.validation.keys
        if key.startswith("validation/") and key.endswith("bits_per_byte")
    )
    return [
        _row(
            "bits per byte" + "".join(f", {part}" for part in key.split("/")[1:-1]),
            [run.validation.last(key) for run in runs],
            ".4f",
        )
        for key in names
    ]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return each setting in which the recipes differ, with its value in each run."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    found = [(key, [run.recipe.get(key, "absent") for run in runs]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]
