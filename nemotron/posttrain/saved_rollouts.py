"""What the state of a checkpoint holds of rollouts, and the checks of what is read back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from nemotron.errors import UserError
from nemotron.posttrain.ahead import NUMBER, PAUSED, ROLLOUTS
from nemotron.posttrain.contents import KEY
from nemotron.posttrain.replay import Differences, Experts
from nemotron.posttrain.rollout import Rollout

BATCH = "rollout_batch"
"""Where the number of the rollout batch at hand stands."""
CURRICULUM = "curriculum"
"""Where the pass rates of a curriculum stand."""
AHEAD = "ahead"
"""Where the rollouts of the next batch stand."""
REPLAYED = "replayed"
"""Key of what is said about replayed experts."""


def check_saved(saved: Mapping[str, Any], step: int) -> None:  # Any: JSON
    """Check that the state is that of a run with rollouts.

    Raises:
        UserError: when it is of another kind of run, or damaged.
    """
    known = {KEY, REPLAYED, BATCH, ROLLOUTS}
    if (saved.keys() - {CURRICULUM, AHEAD}) | {KEY, REPLAYED} != known:
        raise UserError(
            f"the checkpoint of step {step} is of a run without rollouts; begin a new run "
            "with init_from."
        )
    if type(saved[BATCH]) is not int:
        rule = "is not a number; resume from another checkpoint."
        raise UserError(rule, key=BATCH, value=saved[BATCH], where=f"the checkpoint of step {step}")


def check_saved_ahead(saved: Any, step: int) -> None:  # Any: JSON
    """Check the form of what was written ahead.

    Raises:
        UserError: when it has another one.
    """
    known = isinstance(saved, dict) and saved.keys() - {PAUSED} == {NUMBER, ROLLOUTS}
    if not known or not all(isinstance(saved.get(k, []), list) for k in (ROLLOUTS, PAUSED)):
        rule = "are damaged; resume from another checkpoint."
        raise UserError(f"the rollouts ahead of step {step} {rule}")


def read_rollouts(
    saved: list[Any], step: int, vocab_size: int, experts: Experts | None
) -> list[Rollout]:  # Any: JSON
    """Return checked rollouts, whose experts are checked if they are replayed.

    Raises:
        UserError: when they are damaged.
    """
    with refusing_damage("the rollouts", step):
        found = [Rollout.of_json(values) for values in saved]
        ids = (i for r in found for i in (*r.task.prompt, *r.tokens))
        if not all(0 <= i < vocab_size for i in ids):
            raise ValueError("an id is not in the vocabulary")
        if experts is not None:
            for rollout in found:
                size = len(rollout.task.prompt) + len(rollout.tokens)
                experts.check(rollout.experts, size)
    return found


def read_differences(saved: Any, step: int) -> Differences:  # Any: JSON
    """Return what is said about replayed experts; checkpoints without router replay say nothing.

    Raises:
        UserError: when it is something else.
    """
    names = {field.name for field in fields(Differences)}
    known = isinstance(saved, dict) and saved.keys() <= names
    if not known or not all(type(count) is int for count in saved.values()):
        raise UserError(f"{REPLAYED} in the checkpoint of step {step} is not counts of tokens.")
    return Differences(**saved)


@contextmanager
def refusing_damage(what: str, step: int) -> Iterator[None]:
    """Turn errors of reading into one sentence about the checkpoint.

    Raises:
        UserError: when there was one.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(
            f"{what} in the checkpoint of step {step} are damaged: {problem}; resume from another "
            "one."
        ) from None
