"""In which order configurations are tried: those of near shapes, single moves, then others."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

from nemotron.ops.tuning.tunable import Configuration, Tunable

LARGER_FIRST = {"memory": True, "latency": True, "compute": False}
"""Memory wants more loads on their way and larger blocks; products want registers and blocks that
fit, with more stages."""


def order(
    tunable: Tunable,
    start: Configuration,
    known: Sequence[Configuration],
    binds: str,
    seed: int = 0,
) -> Iterator[Configuration]:
    """Yield the whole space without repeats: the start, what is known, moves from it, the others.

    `known` are the best of near shapes; a move changes one parameter by one value, up or down by
    what binds the kernel. The others are shuffled, always in the same way.
    """
    seen: set[tuple[int, ...]] = set()
    names = list(tunable.space)

    def new(configuration: Configuration) -> bool:
        key = tuple(configuration[name] for name in names)
        if key in seen:
            return False
        seen.add(key)
        return True

    everything = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(tunable.space[name] for name in names))
    ]
    random.Random(seed).shuffle(everything)
    first = [start, *known]
    yield from (c for c in first if new(c))
    for base in first:
        yield from (c for c in moves(tunable, base, binds) if new(c))
    yield from (c for c in everything if new(c))


def moves(tunable: Tunable, start: Configuration, binds: str) -> Iterator[Configuration]:
    """Yield what differs from `start` by one step of one parameter."""
    up = LARGER_FIRST[binds]
    for step in (1, -1) if up else (-1, 1):
        for name, values in tunable.space.items():
            # stages hide loads, whatever binds
            place = _place(values, start[name]) + (step if up or name != "stages" else -step)
            if 0 <= place < len(values):
                yield {**start, name: values[place]}


def _place(values: Sequence[int], value: int) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - value))


def text(configuration: Mapping[str, int]) -> str:
    """Return a configuration as people write it: `8 warps, 3 stages`."""
    return ", ".join(f"{value} {name}" for name, value in configuration.items())
