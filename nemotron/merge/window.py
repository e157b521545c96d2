"""Which checkpoints of a run are averaged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nemotron.checkpoint.manifest import (
    CheckpointInfo,
    DamagedCheckpoint,
    OldCheckpoint,
    folder_name,
    steps,
    verify,
)
from nemotron.checkpoint.read import read_model_config, read_state
from nemotron.errors import UserError
from nemotron.hf.source import CheckpointSource, TensorReader
from nemotron.run.files import RunFiles


@dataclass(frozen=True)
class Trained:
    """A whole checkpoint of a run, and the tokens that the run had consumed then."""

    source: CheckpointSource
    reader: TensorReader
    tokens: int

    @property
    def step(self) -> int:
        """Steps done."""
        return self.source.info.step


Window = tuple[Trained, ...]
"""Two or more checkpoints of one model, oldest first."""


def read_checkpoints(
    run: RunFiles, report: Callable[[str], None]
) -> tuple[Window, tuple[int, ...]]:
    """Return the whole checkpoints of a run, and the steps of damaged ones, which are reported.

    Raises:
        UserError: when fewer than two can be averaged.
    """
    found: list[Trained] = []
    damaged = []
    for step in reversed(steps(run.checkpoints)):
        path = run.checkpoints / folder_name(step)
        try:
            found.append(_open(verify(path)))
        except OldCheckpoint as old:
            raise UserError(f"{old}.") from None
        except DamagedCheckpoint as damage:
            report(f"{path.name} is damaged ({damage}); left out")
            damaged.append(step)
    if len(found) < 2:
        raise UserError(
            f"has {len(found)} whole checkpoint{'s' * (len(found) != 1)}, and two or "
            "more are averaged; train on, or keep more of them with checkpoint.keep.",
            where=str(run.path),
        )
    _check_alike(found)
    return tuple(found), tuple(damaged)


def share_of_run(window: Window) -> float:
    """Return the tokens from the oldest to the newest checkpoint over all tokens until then."""
    return 1 - window[0].tokens / window[-1].tokens


def last_tokens(checkpoints: Window, tokens: float) -> Window:
    """Return the window over the last so many tokens.

    Raises:
        UserError: when the checkpoints that are left do not reach back so far.
    """
    newest, oldest = checkpoints[-1], checkpoints[0]
    begin = newest.tokens - tokens
    if not 0 < tokens <= newest.tokens:
        raise UserError(
            f"must be above 0 and at most {newest.tokens:,}, the tokens of step {newest.step:,}.",
            key="--last-tokens",
            value=tokens,
        )
    if begin < oldest.tokens and begin != 0:
        raise UserError(
            f"reaches back to token {begin:,.0f}, but the oldest checkpoint, of step "
            f"{oldest.step:,}, is at {oldest.tokens:,}; keep more of them with checkpoint.keep, or "
            f"give at most {newest.tokens - oldest.tokens:,}.",
            key="--last-tokens",
            value=tokens,
        )
    found = tuple(one for one in checkpoints if one.tokens >= begin)
    if len(found) < 2:
        step = newest.tokens - checkpoints[-2].tokens
        raise UserError(
            f"contains one checkpoint; the one before it is {step:,} tokens older.",
            key="--last-tokens",
            value=tokens,
        )
    return found


def last(checkpoints: Window, number: int) -> Window:
    """Return the window of the newest so many checkpoints.

    Raises:
        UserError: when there are not so many.
    """
    if number > len(checkpoints):
        raise UserError(
            f"is more than the {len(checkpoints)} whole checkpoints of the run; keep more of them "
            "with checkpoint.keep.",
            key="--last",
            value=number,
        )
    return checkpoints[-number:]


def of_steps(checkpoints: Window, wanted: Sequence[int]) -> Window:
    """Return the window of the checkpoints of these steps.

    Raises:
        UserError: when one of them is not there, or they are fewer than two.
    """
    known = [one.step for one in checkpoints]
    for step in wanted:
        if step not in known:
            raise UserError(
                f"has no whole checkpoint; there are {', '.join(map(str, known))}.",
                key="--step",
                value=step,
            )
    if len(set(wanted)) < 2:
        raise UserError("names one checkpoint; give two or more.", key="--step", value=wanted[0])
    return tuple(one for one in checkpoints if one.step in wanted)


def _open(info: CheckpointInfo) -> Trained:
    state = read_state(info)
    if state.trainer is None:
        raise UserError(
            "was not trained here, so the tokens between it and others are unknown; "
            "give a run that was trained.",
            where=str(info.folder),
        )
    source = CheckpointSource(info, read_model_config(info))
    return Trained(source, source.reader(), state.trainer.tokens)


def _check_alike(checkpoints: list[Trained]) -> None:
    newest = checkpoints[-1].source
    for before, after in pairwise(checkpoints):
        if before.tokens >= after.tokens:
            raise UserError(
                f"is damaged: it has seen {after.tokens:,} tokens, and "
                f"step {before.step:,} {before.tokens:,}; move one of them out of the run.",
                where=str(after.source.info.folder),
            )
    for one in checkpoints:
        if one.source.config != newest.config:
            raise UserError(
                f"has another model than {newest.info.folder.name}; "
                "move it out of the run's checkpoints.",
                where=str(one.source.info.folder),
            )
