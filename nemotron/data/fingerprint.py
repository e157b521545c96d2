"""Telling whether a resumed run reads the rows that it would have read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron.errors import UserError


def check_same_data(
    saved: Mapping[str, Any],  # Any: strings and numbers, as JSON holds them
    now: Mapping[str, Any],
    files: Mapping[str, Path],
) -> None:
    """Compare two results of `TrainingData.fingerprint`; `files` names each source's tokens.

    Raises:
        UserError: when they differ, naming the file or the setting.
    """
    names = {key: ", ".join(side["sources"]) for key, side in (("saved", saved), ("now", now))}
    if names["saved"] != names["now"]:
        _refuse("data.sources", names["saved"], names["now"])
    for name, source in now["sources"].items():
        then = saved["sources"][name]
        if any(then[key] != source[key] for key in ("tokens", "content")):
            raise UserError(
                f"{files[name]} is not the file that the checkpoint was trained on: it has "
                f"{source['tokens']} tokens with hash {source['content']}, there were "
                f"{then['tokens']} with hash {then['content']}; restore it or start a new run."
            )
        if then["weight"] != source["weight"]:
            _refuse(f"data.sources: the weight of {name}", then["weight"], source["weight"])
    for key, value in now.items():
        if key != "sources" and saved.get(key) != value:
            _refuse(key, saved.get(key), value)


def _refuse(what: str, then: object, now: object) -> None:
    raise UserError(
        f"{what} was {then} when the checkpoint was written and is {now} now; "
        "restore it or start a new run."
    )
