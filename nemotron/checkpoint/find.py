"""Finding the newest complete checkpoint, and the reasons why newer ones were skipped."""

from dataclasses import dataclass
from pathlib import Path

from nemotron.checkpoint.manifest import (
    STEP_FOLDER,
    CheckpointInfo,
    OldCheckpoint,
    folder_name,
    steps,
    verify,
)
from nemotron.checkpoint.records import DamagedCheckpoint
from nemotron.errors import UserError
from nemotron.parallel.runtime import Ranks

SAVING = ".nemotron-saving-"
"""Start of the name of a checkpoint that is being written, before its own name."""


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be used; as text, one line for the log."""

    step: int
    damage: str | None
    """Absent: its save was interrupted."""

    def __str__(self) -> str:
        if self.damage is None:
            return f"{folder_name(self.step)} is incomplete (the save was interrupted); skipped"
        return f"{folder_name(self.step)} is damaged ({self.damage}); skipped"


@dataclass(frozen=True)
class Search:
    """The newest complete checkpoint of a folder, and the newer ones that are not."""

    info: CheckpointInfo | None
    skipped: tuple[Skipped, ...]


def newest(folder: Path, ranks: Ranks | None = None) -> Search:
    """Return the newest checkpoint whose every file has the size and hash of its manifest.

    Ranks share the files among them, and find the same. Nothing is deserialized on the way.

    Raises:
        UserError: when the newest whole one has the old layout, or is not the same for all ranks.
    """
    ranks = ranks or Ranks()
    candidates, unfinished = ranks.first(lambda: (steps(folder), _unfinished(folder)))
    skipped = [Skipped(step, None) for step in unfinished if not candidates or step > candidates[0]]
    share = slice(ranks.rank, None, ranks.world)
    for step in candidates:
        path = folder / folder_name(step)
        try:
            infos = ranks.each(lambda path=path: verify(path, share=share))  # type: ignore[misc]
        except OldCheckpoint as old:
            raise UserError(f"{old}.") from None
        except DamagedCheckpoint as damage:
            skipped.append(Skipped(step, str(damage)))
        else:
            _refuse_unlike(path, infos)
            return Search(infos[0], tuple(skipped))
    return Search(None, tuple(skipped))


def locate(path: Path) -> Search:
    """Find the checkpoint meant by a run's folder, its `checkpoints` folder, or one checkpoint.

    Raises:
        UserError: when there is none that is whole.
    """
    if STEP_FOLDER.fullmatch(path.name):
        try:
            return Search(verify(path), ())
        except OldCheckpoint as old:
            raise UserError(f"{old}.") from None
        except DamagedCheckpoint as damage:
            raise UserError(
                f"is damaged: {damage}; use an older checkpoint.", where=str(path)
            ) from None
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not path.exists():
        raise UserError("does not exist; give a run or a checkpoint.", where=str(path.absolute()))
    found = newest(folder)
    if found.info is None:
        reasons = "".join(f"; {skipped}" for skipped in found.skipped)
        advice = "" if reasons else "; give a run or a checkpoint"
        raise UserError(f"contains no complete checkpoint{reasons}{advice}.", where=str(path))
    return found


def _refuse_unlike(path: Path, infos: list[CheckpointInfo]) -> None:
    """Raise UserError when ranks found different checkpoints under the same name."""
    others = [rank for rank, info in enumerate(infos) if info != infos[0]]
    if others:
        raise UserError(
            f"is another checkpoint on rank {others[0]} than on rank 0; "
            "give the run a folder that all machines share.",
            where=str(path),
        )


def _unfinished(folder: Path) -> list[int]:
    """Return the steps whose saves were interrupted, newest first."""
    names = (path.name.removeprefix(SAVING) for path in folder.glob(f"{SAVING}*"))
    return sorted({int(match[1]) for name in names if (match := STEP_FOLDER.match(name))})[::-1]
