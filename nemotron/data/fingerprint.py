"""Telling whether a resumed run reads the rows that it would have read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron.errors import UserError


def check_same_data(
    saved: Mapping[str, Any],  # Any: nested JSON
    now: Mapping[str, Any],
    files: Mapping[str, Path],
    phase: int,
) -> None:
    """Compare two results of `TrainingData.fingerprint`, as far as the run has come.

    `files` names each source's tokens; `phase` is the number of the phase that the run is in: its
    length may differ, and so may everything after it.

    Raises:
        UserError: when they differ, naming the file or the setting.
    """
    if "phases" not in saved:
        raise UserError(
            "the checkpoint was written by an older version, which did not store phases; start a "
            "new "
            "run with init_from."
        )
    for key, value in now.items():
        if key not in ("sources", "phases") and saved.get(key) != value:
            _refuse(key, saved.get(key), value)
    for number in range(phase + 1):
        then = saved["phases"][number] if number < len(saved["phases"]) else {}
        _check_phase(then, now["phases"][number], number, is_open=number == phase)
    for name, source in now["sources"].items():
        known = saved["sources"].get(name)
        if known is not None and known != source:
            raise UserError(
                f"{files[name]} differs from the data that the checkpoint was trained on: it has "
                f"{source['tokens']} tokens with hash {source['content']}, but the checkpoint read "
                f"{known['tokens']} with hash {known['content']}; restore it or start a new run."
            )


def _check_phase(
    then: Mapping[str, Any], now: Mapping[str, Any], number: int, *, is_open: bool
) -> None:
    where = f"phases.{number}"
    for key in ("num_steps", "tokens_per_step"):
        if then.get(key) != now[key] and not (is_open and key == "num_steps"):
            _refuse(f"{where}: {key}", then.get(key), now[key])
    lengths = [[part["seq_len"] for part in side.get("lengths", [])] for side in (then, now)]
    if lengths[0] != lengths[1]:
        _refuse("data.seq_len", *(", ".join(map(str, side)) for side in lengths))
    for old, new in zip(then["lengths"], now["lengths"], strict=True):
        if old["share"] != new["share"]:
            _refuse(f"{where}: the share of rows of {new['seq_len']}", old["share"], new["share"])
        names = [", ".join(side["sources"]) for side in (old, new)]
        if names[0] != names[1]:
            _refuse("data.sources", *names)
        for name, weight in new["sources"].items():
            if old["sources"][name] != weight:
                _refuse(f"data.sources: the weight of {name}", old["sources"][name], weight)


def _refuse(what: str, then: object, now: object) -> None:
    raise UserError(
        f"{what} was {then} when the checkpoint was written and is {now} now; "
        "restore it or start a new run."
    )
