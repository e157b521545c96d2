"""Lengths of a schedule: one that a recipe gives replaces what it extends, in any unit."""

from collections.abc import Iterator, Mapping
from typing import Any

from nemotron.recipe.read import Document, place_of
from nemotron.train.config import LENGTHS, length_keys


def drop_replaced_lengths(below: Document, above: Document) -> None:
    """Remove from `below` the lengths that the schedule of `above` takes the place of.

    So `schedule.total_tokens` replaces an extended `total_steps`, and `kind: cosine`, which has no
    decay length, an extended `decay_steps`. What two settings of one place say is left to be
    refused, for example two on the command line.
    """
    old, new = below.values.get("schedule"), above.values.get("schedule")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return
    for key, replaced in _replacements(new):
        path = ("schedule", replaced)
        is_there = old.get(replaced) is not None and replaced not in new
        place = place_of(above.places, ("schedule", key), "")
        if is_there and place_of(below.places, path, "") != place:
            below.values["schedule"] = old = {k: v for k, v in old.items() if k != replaced}
            below.places.pop(path, None)


def _replacements(schedule: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key that gives a length, with a key of another unit."""
    for name in LENGTHS:
        keys = length_keys(name)
        given = [key for key in keys if schedule.get(key) is not None]
        yield from ((key, other) for key in given for other in keys)
    if schedule.get("kind", "wsd") != "wsd":
        yield from (("kind", key) for key in length_keys("decay"))
