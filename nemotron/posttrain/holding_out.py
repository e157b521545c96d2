"""Tasks that training never asks: a hash of the prompt decides, whatever the seed."""

import hashlib
import json
from collections.abc import Iterator

from nemotron.errors import UserError
from nemotron.posttrain.environments.base import Environment, Row, messages_of

MOST_MISSES = 10_000
"""Rows of the other kind, one after another, after which an environment is refused."""


def is_held_out(row: Row, fraction: float) -> bool:
    """Say whether a task is one of those that only evaluations ask.

    Raises:
        BadRow: when the row has no prompt.
    """
    prompt = json.dumps(messages_of(row), sort_keys=True).encode()
    place = int.from_bytes(hashlib.sha256(prompt).digest()[:8], "big")
    return place < fraction * 2**64


def draw_rows(
    environment: Environment, count: int, seed: int, level: float, fraction: float, *, held: bool
) -> Iterator[Row]:
    """Yield so many tasks of an environment that are held out, or so many that are not.

    With a fraction of 0 nothing is held out, and these are the environment's first rows.

    Raises:
        BadRow: when a row has no prompt.
        UserError: when the environment has too few tasks of that kind.
    """
    if not fraction:
        yield from environment.rows(count, seed, level)
        return
    found = misses = 0
    for row in environment.rows(MOST_MISSES * (count + 1), seed, level):
        if found == count:
            return
        if is_held_out(row, fraction) == held:
            found, misses = found + 1, 0
            yield row
        elif (misses := misses + 1) == MOST_MISSES:
            break
    kind = "held-out" if held else "other"
    raise UserError(
        f"leaves {environment.name} too few {kind} tasks; choose a fraction nearer to 0.5, a "
        "higher level, or 0.",
        key="rollout.held_out_fraction",
        value=fraction,
    )
