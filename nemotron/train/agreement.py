"""Whether all ranks run the same: recipe, versions, code, data and initial weights."""

import functools
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from nemotron.errors import UserError, show_value
from nemotron.parallel.runtime import Ranks, name_ranks
from nemotron.run.folder import flatten
from nemotron.run.provenance import versions
from nemotron.train.config import RunConfig
from nemotron.train.reliability.replicas import checksum

LOCAL = ("data.cache",)
"""Keys that may differ from rank to rank: each machine may have a cache of its own."""
NUM_NAMED = 5
"""Differences that a sentence names."""

Facts = dict[str, str]
"""What must be the same on every rank, by a name that the user knows."""


def check_agreement(facts: Facts, ranks: Ranks) -> None:
    """Compare what all ranks found; called by every rank at the same place.

    Raises:
        UserError: on every rank, with the keys that differ, their values and the ranks.
    """
    if len(set(ranks.gather(_digest(facts)))) > 1:
        raise UserError(_sentence(ranks.gather(facts)))


def facts_of_start(config: RunConfig, device: torch.device, *, resume: bool) -> Facts:
    """Return what is known of a rank before it opens any data."""
    recipe = {k: v for k, v in flatten(config.model_dump()).items() if k not in LOCAL}
    packages = {f"the version of {name}": version for name, version in versions().items()}
    facts = recipe | packages | {"--resume": resume, "the kind of device": device.type}
    return _texts(facts | {"the code of nemotron": _code()})


def facts_of_data(state: Mapping[str, Any]) -> Facts:  # Any: nested JSON
    """Return what identifies the data of a rank, given what `Batches.state` returns."""
    return _texts({f"the data's {key}": value for key, value in flatten(dict(state)).items()})


def facts_of_weights(weights: Mapping[str, Tensor]) -> Facts:
    """Return what identifies the weights that a rank starts from."""
    return {f"init_from: {name}": f"{checksum(t).item():x}" for name, t in weights.items()}


def _texts(values: Mapping[str, Any]) -> Facts:  # Any: nested JSON
    return {key: json.dumps(value, default=str) for key, value in values.items()}


def _digest(facts: Facts) -> str:
    return xxhash.xxh128(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Return the hash of this package's files: a version says little of one that is worked on."""
    digest, root = xxhash.xxh128(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _sentence(everyone: list[Facts]) -> str:
    differing = [
        (key, holders)
        for key in dict.fromkeys(key for facts in everyone for key in facts)
        if len(holders := _holders(key, everyone)) > 1
    ]
    clauses = [f"{key} = {_sides(holders)}" for key, holders in differing[:NUM_NAMED]]
    more = f", and {len(differing) - NUM_NAMED} more" if len(differing) > NUM_NAMED else ""
    return (
        f"the ranks do not run the same: {'; '.join(clauses)}{more}; "
        "start every rank with the same recipe, installation and data."
    )


def _holders(key: str, everyone: list[Facts]) -> dict[str, list[int]]:
    """Return the ranks that have each value of a key."""
    holders: dict[str, list[int]] = defaultdict(list)
    for rank, facts in enumerate(everyone):
        holders[facts.get(key, "absent")].append(rank)
    return holders


def _sides(holders: dict[str, list[int]]) -> str:
    sides = (f"{show_value(value)} on {name_ranks(ranks)}" for value, ranks in holders.items())
    return " but ".join(sides)
