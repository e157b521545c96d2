"""Telling whether a resumed run reads the rows that it would have read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, NonNegativeInt, ValidationError

from nemotron.errors import UserError
from nemotron.section import Section


class SourceIdentity(Section):
    """What a source is recognized by."""

    tokens: NonNegativeInt
    content: str


class LengthBlend(Section):
    """Weights of the sources of the rows of one length."""

    seq_len: NonNegativeInt
    share: float
    sources: dict[str, float]


class PhaseBlend(Section):
    """A phase, as far as rows depend on it."""

    name: str
    num_steps: NonNegativeInt
    tokens_per_step: NonNegativeInt
    lengths: list[LengthBlend]


class Fingerprint(Section):
    """A result of `TrainingData.fingerprint`, as a checkpoint holds it."""

    seed: int
    seq_len: JsonValue = Field(alias="data.seq_len")
    packing: JsonValue = Field(alias="data.packing")
    objective: JsonValue = Field(alias="data.objective")
    mask_eod_loss: JsonValue = Field(alias="data.mask_eod_loss")
    tokenizer: JsonValue = Field(alias="data.tokenizer")
    eod_token: JsonValue = Field(alias="data.eod_token")
    sources: dict[str, SourceIdentity]
    phases: list[PhaseBlend]
    contents: dict[str, str] = Field(default_factory=dict)
    """Hashes of the models beside the data, in stages that learn from some."""


def read_fingerprint(saved: Mapping[str, Any]) -> Fingerprint:  # Any: JSON
    """Return the fingerprint in a checkpoint's state.

    Raises:
        UserError: naming the key that is unknown, absent or of another type.
    """
    try:
        return Fingerprint.model_validate(saved)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(("data", *map(str, problem["loc"])))
        rules = {"missing": "is missing", "extra_forbidden": "is an unknown key"}
        rule = rules.get(problem["type"], problem["msg"].replace("Input should", "must"))
        raise UserError(
            f"{rule}, so what it was trained on is unknown; start a new run with init_from.",
            key=key,
            where="state.json of the checkpoint",
        ) from None


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
    read_fingerprint(saved)
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
                f"differs from the data that the checkpoint was trained on: it has "
                f"{source['tokens']} tokens with hash {source['content']}, but the checkpoint read "
                f"{known['tokens']} with hash {known['content']}; restore it or start a new run.",
                where=str(files[name]),
            )


def _check_phase(
    then: Mapping[str, Any], now: Mapping[str, Any], number: int, *, is_open: bool
) -> None:
    where = f"phases.{number}"
    keys = {"num_steps": f"{where}: steps", "tokens_per_step": f"{where}: global_tokens"}
    for key in ("num_steps", "tokens_per_step"):
        if then.get(key) != now[key] and not (is_open and key == "num_steps"):
            _refuse(keys[key], then.get(key), now[key])
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
    rule = (
        f"was {then} when the checkpoint was written and is {now} now; restore it or start a new "
        "run."
    )
    raise UserError(rule, key=what)
