"""Rolling back to a checkpoint from before the steps that went wrong, never to compute those again.

Rows are a function of the step, so the run is replayed from the checkpoint, and steps in the
offending range only count. What was written after the checkpoint is removed as if it had never
been: a run that is killed during the replay resumes at the checkpoint and is rolled back once more.
"""

from collections.abc import Sequence
from pathlib import Path

from nemotron.checkpoint.housekeeping import discard
from nemotron.checkpoint.manifest import CheckpointInfo, folder_name, steps, verify
from nemotron.checkpoint.records import DamagedCheckpoint
from nemotron.checkpoint.state import PassedOver
from nemotron.train.state import Diverged
from nemotron.train.trainer import Trainer

ROLLBACKS = 3
"""How often a run is rolled back to the same weights before it gives up."""


def roll_back(trainer: Trainer, checkpoints: Path, bad: Sequence[int]) -> CheckpointInfo:
    """Restore the newest checkpoint from before the steps of these indices; returns it.

    Where none is as old, that is the oldest one.

    Raises:
        Diverged: on every rank, when there is no checkpoint, or it was rolled back to often enough.
    """
    first, last = bad[0], bad[-1]
    ranges = trainer.state.passed_over
    what = f"{len(bad)} steps from {first + 1} to {last + 1} were not finite or spikes"
    info = trainer.ranks.first(lambda: newest_before(checkpoints, first))
    if info is None:
        raise Diverged(f"{what}, and there is no whole checkpoint to roll back to")
    origin = _last_computed(info.step, ranges)
    if sum(steps.origin == origin for steps in ranges) >= ROLLBACKS:
        raise Diverged(f"{what}, and the run was rolled back to step {origin} {ROLLBACKS} times")
    try:
        trainer.ranks.first(lambda: _remove_after(checkpoints, info.step))
    except OSError as error:
        raise Diverged(f"{what}, and a later checkpoint cannot be removed: {error}") from error
    trainer.restore(info)
    trainer.state.passed_over = [*ranges, PassedOver(first, last, origin)]
    trainer.state.bad_steps = []
    return info


def newest_before(checkpoints: Path, step: int) -> CheckpointInfo | None:
    """Return the newest whole checkpoint of at most so many steps; else the oldest whole one."""
    found = None
    for number in steps(checkpoints):
        try:
            found = verify(checkpoints / folder_name(number))
        except DamagedCheckpoint:
            continue
        if number <= step:
            break
    return found


def _last_computed(step: int, ranges: Sequence[PassedOver]) -> int:
    """Return the step whose weights a checkpoint has: that before what was passed over."""
    for passed in reversed(ranges):
        if passed.first < step <= passed.last + 1:
            step = passed.first
    return step


def _remove_after(checkpoints: Path, step: int) -> None:
    for number in steps(checkpoints):  # newest first: whatever a kill leaves is a beginning
        if number > step:
            discard(checkpoints / folder_name(number))  # the next save names what stays of it
