"""Averaging checkpoints of a run into a new run, which holds that one checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from nemotron.checkpoint.state import SavedState
from nemotron.checkpoint.write import CheckpointNotSaved
from nemotron.errors import UserError
from nemotron.evaluate.held_out import HeldOut
from nemotron.exit_codes import DONE, FAILED
from nemotron.files import write_bytes
from nemotron.hf.inside import read_inside
from nemotron.merge.average import Average
from nemotron.merge.coefficients import EMA_DECAY, SHAPES, Shape
from nemotron.merge.search import Candidate, candidates
from nemotron.merge.window import (
    Window,
    last,
    last_tokens,
    of_steps,
    read_checkpoints,
    share_of_run,
)
from nemotron.outputs import check_output, output_folder, publish, writing_beside
from nemotron.recipe.load import load_recipe
from nemotron.run.files import RunFiles
from nemotron.run.provenance import Facts, read_provenance, record_merge
from nemotron.terminal import print_text

COMMAND = "merge"
WIDE = 0.1
"""Share of a run's tokens from which a window is said to be long; Super's longest is 2.5 %."""


@dataclass(frozen=True)
class Choice:
    """Which windows and shapes the command line names; all if it names none."""

    last_tokens: Sequence[float] = ()
    last: Sequence[int] = ()
    steps: Sequence[int] = ()
    shape: Shape | None = None
    ema_decay: float = EMA_DECAY
    search: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ema_decay <= 1:
            raise UserError(
                "must be above 0 and at most 1.", key="--ema-decay", value=self.ema_decay
            )

    def windows(self, checkpoints: Window) -> list[Window]:
        """Return the windows: one, or several for a search to choose from.

        Raises:
            UserError: when one of them is not there.
        """
        named = [last_tokens(checkpoints, tokens) for tokens in self.last_tokens]
        named += [last(checkpoints, number) for number in self.last]
        if self.steps:
            named.append(of_steps(checkpoints, self.steps))
        if self.search:
            every = [checkpoints[-number:] for number in range(2, len(checkpoints) + 1)]
            return named or every
        if len(named) > 1:
            raise UserError("several windows were given; add --search, or leave one.")
        return named or [checkpoints]


def check_shape(name: str | None) -> Shape | None:
    """Return the shape of that name.

    Raises:
        UserError: when there is none.
    """
    found = [shape for shape in SHAPES if shape == name]
    if name is not None and not found:
        raise UserError(f"is unknown; use one of {', '.join(SHAPES)}.", key="--shape", value=name)
    return found[0] if found else None


def merge(
    run: Path, out: Path, choice: Choice, *, device: str = "auto", overwrite: bool = False
) -> int:
    """Write the average of a run's checkpoints as a run; returns the exit code.

    Raises:
        UserError: when there is nothing to average, or the target may not be written; nothing is.
    """
    files, target = RunFiles(run), output_folder(out)
    if not files.checkpoints.is_dir():
        raise UserError("does not exist; give the folder of a run.", where=str(files.checkpoints))
    check_output(target, COMMAND, [files.path], overwrite=overwrite)
    if target.resolve().is_relative_to(files.checkpoints.resolve()):
        raise UserError(
            "is inside the checkpoints folder; choose another folder.", where=str(target)
        )
    checkpoints, damaged = read_checkpoints(files, print_text)
    windows = choice.windows(checkpoints)
    if choice.search:
        chosen = _search(files, windows, choice, device)
    else:
        chosen = Candidate(windows[0], choice.shape or SHAPES[0])
        if (share := share_of_run(chosen.window)) > WIDE:
            print_text(
                f"note: the checkpoints lie {share:.0%} of the run's tokens apart, and the oldest "
                "ones count most; with --search or a smaller window the average may be better"
            )
    average = chosen.average(choice.ema_decay)
    try:
        with writing_beside(target, COMMAND) as partial:
            _write_run(files, average, chosen, damaged, RunFiles(partial))
            publish(partial, target, COMMAND)
    except CheckpointNotSaved as problem:
        print_text(f"failed: {problem}")
        return FAILED
    for one, coefficient in zip(average.window, average.coefficients, strict=True):
        print_text(f"{coefficient:8.5f} of step {one.step:,} ({one.tokens:,} tokens)")
    print_text(f"merged {chosen} into {target}")
    return DONE


def _search(files: RunFiles, windows: list[Window], choice: Choice, device: str) -> Candidate:
    """Print the validation loss of each candidate, and return the best average."""
    held_out = HeldOut(load_recipe(files.path).text, device)
    shapes = (choice.shape,) if choice.shape else SHAPES
    found: list[tuple[float, Candidate]] = []
    print_text("validation loss")
    for candidate in candidates(windows, shapes):
        candidate.average(choice.ema_decay).load(held_out.model)
        loss = held_out.metrics()["validation/loss"]
        print_text(f"{loss:10.5f}  {candidate}")
        found.append((loss, candidate))
    (loss_alone, alone), *averages = found
    loss, best = min(averages, key=itemgetter(0))
    if loss >= loss_alone:
        print_text(f"note: no average is better than {alone}; the best of them is written")
    return best


def _write_run(
    source: RunFiles,
    average: Average,
    chosen: Candidate,
    damaged: tuple[int, ...],
    run: RunFiles,
) -> None:
    """Fill the empty folder of `run` with the checkpoint and the files that belong to its model."""
    for file in (source.tokenizer, source.recipe):
        if file.exists():
            write_bytes(run.path / file.name, read_inside(file))
    run.companions.mkdir()
    if source.companions.is_dir():
        for file in sorted(source.companions.iterdir()):
            write_bytes(run.companions / file.name, read_inside(file))
    facts: Facts = {
        "from": source.path.resolve().name,
        "run": read_provenance(source.provenance).id if source.provenance.exists() else None,
        "shape": chosen.shape,
        "steps": [one.step for one in average.window],
        "tokens": [one.tokens for one in average.window],
        "coefficients": list(average.coefficients),
        "damaged": list(damaged),
    }
    average.write(run.checkpoints, SavedState(merged=record_merge(run.provenance, facts)))
