"""Where the time of a recorded step went: to which kind of layer, forward and backward."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemotron.model.config import LAYER_KINDS, ModelConfig
from nemotron.model.flops import depth_flops, head_flops, layer_flops

MARK = "nemotron: "
"""Begins the names of ranges around layers in a trace."""
PREDICTION, REST = "prediction", "rest"
"""Multi-token prediction; and embedding, head, loss, optimizer, and all else of a step."""
NODE = "autograd::engine::evaluate_function"
"""Begins the names of what backward does for one operation of the forward pass."""


@dataclass
class Seconds:
    """Of one step, by kind of layer."""

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    """With what it computes again, where activations are not kept."""
    total: float = 0.0
    """From the first operation to the end of the last one."""


def attribute(events: Iterable[Any], *, on_gpu: bool) -> Seconds:
    """Return the seconds of the events of a recorded step; `Any`: torch does not type them.

    An operation of the backward pass belongs to the layer in whose forward pass the operation ran
    that it is the gradient of: both have one sequence number.
    """
    found, kinds = Seconds(), dict[int, str]()
    events = sorted(events, key=lambda event: event.time_range.start)
    for event in events:
        # of several with one number the last made the node
        if event.sequence_nr >= 0 and event.scope == 0 and not event.name.startswith(NODE):
            kinds[event.sequence_nr] = _layer_of(event) or REST
    for event in events:
        used = event.device_time_total if on_gpu else event.cpu_time_total
        if event.cpu_parent is not None:
            continue
        if event.name.startswith(MARK):
            found.forward[event.name.removeprefix(MARK)] += used / 1e6
        elif event.name.startswith(NODE):
            found.backward[kinds.get(event.sequence_nr, REST)] += used / 1e6
    starts = [event.time_range.start for event in events]
    ends = [event.time_range.end for event in events]
    found.total = (max(ends) - min(starts)) / 1e6 if events else 0.0
    return found


def _layer_of(event: Any) -> str | None:  # Any: as in `attribute`
    """Return the kind of the outermost layer in whose forward pass an event lies."""
    kind = None
    while event is not None:
        if event.name.startswith(MARK):
            kind = event.name.removeprefix(MARK)
        event = event.cpu_parent
    return kind


def step_flops(model: ModelConfig, seq_len: int, num_depths: int, tokens: int) -> dict[str, float]:
    """Return the FLOPs of a step by kind of layer, forward and backward, by formula."""
    pattern = Counter(model.hybrid_override_pattern)
    flops: dict[str, float] = {
        LAYER_KINDS[letter]: 3.0 * tokens * count * layer_flops(model, letter, seq_len)
        for letter, count in pattern.items()
    }
    if num_depths:
        flops[PREDICTION] = 3.0 * tokens * num_depths * depth_flops(model, seq_len)
    return flops | {REST: 3.0 * tokens * head_flops(model)}


def report(
    model: ModelConfig, seq_len: int, num_depths: int, tokens: int, steps: Sequence[Seconds]
) -> list[str]:
    """Return a table of the mean of the recorded steps: FLOPs of the whole step, time of a rank."""
    flops = step_flops(model, seq_len, num_depths, tokens)
    whole, number = sum(flops.values()), len(steps)
    total = sum(step.total for step in steps) / number
    lines = ["profile    layers            FLOPs  share    forward   backward  of the step"]
    rest = total
    for kind in (*dict.fromkeys(LAYER_KINDS.values()), PREDICTION, REST):
        if kind not in flops:
            continue
        forward = sum(step.forward[kind] for step in steps) / number
        backward = sum(step.backward[kind] for step in steps) / number
        used = f"{forward * 1e3:>7,.1f} ms {backward * 1e3:>7,.1f} ms"
        if kind == REST:
            used, forward, backward = " " * 21, rest, 0.0
        rest -= forward + backward
        lines.append(
            f"profile    {kind:<12} {flops[kind] / 1e9:>8,.2f} G {flops[kind] / whole:>6.1%} "
            f"{used} {(forward + backward) / total:>12.1%}"
        )
    lines.append(
        f"profile    step         {whole / 1e9:>8,.2f} G, {total * 1e3:,.1f} ms with the "
        f"recording; mean of {number}; rest: embedding, head, loss, optimizer, waiting"
    )
    return lines
