"""The checkpoints of a run: saving, rolling back to one, and beginning at the newest."""

import time
from collections.abc import Callable, Sequence

from nemotron.checkpoint.background import BackgroundSaver
from nemotron.checkpoint.find import newest
from nemotron.checkpoint.manifest import folder_name
from nemotron.checkpoint.write import CheckpointNotSaved, Content, save
from nemotron.errors import UserError
from nemotron.run.folder import RunFolder
from nemotron.run.log import RunLog
from nemotron.train.rollback import roll_back
from nemotron.train.trainer import Trainer


class Saver:
    """Saves a trainer, or gives it back what was saved; called by all ranks at the same place."""

    def __init__(self, trainer: Trainer, folder: RunFolder, log: RunLog) -> None:
        self._trainer, self._folder, self._log = trainer, folder.checkpoints, log
        self.saved_step: int | None = None
        """Step of the newest checkpoint that is whole."""
        self._warned: set[str] = set()
        is_on = trainer.config.checkpoint.background
        self._background = BackgroundSaver(trainer.ranks) if is_on else None

    def restore(self) -> bool:
        """Go to the newest whole checkpoint; says whether there was one.

        Raises:
            UserError: when there are checkpoints, but none of them is whole or fits.
        """
        found = newest(self._folder, self._trainer.ranks)
        for skipped in found.skipped:
            self._log.info(str(skipped))
        if found.info is None:
            if damaged := [one for one in found.skipped if one.damage is not None]:
                raise UserError(
                    f"holds no complete checkpoint: {damaged[0]}; "
                    f"remove the damaged ones to start at step 0, or give the run another name.",
                    where=str(self._folder),
                )
            self._log.info(f"{self._folder.parent} has no checkpoint; starting at step 0")
            return False
        self._trainer.restore(found.info)
        self.saved_step = found.info.step
        self._log.info(f"resumed at step {found.info.step} from {found.info.folder}")
        return True

    def save(self) -> None:
        """Write a checkpoint of this step unless it exists already.

        Raises:
            CheckpointNotSaved: on every rank, when there is no room for it.
        """
        trainer, step = self._trainer, self._trainer.state.step
        self.finish(wait=True)
        if step == self.saved_step:
            return
        trainer.check_replicas()
        trainer.progress.enter(step - 1, "save")
        self._log.sync()
        start = time.perf_counter()
        state = trainer.saved_state()
        content = Content(step, trainer.tensors(), state, trainer.config.model)
        keep = trainer.config.checkpoint.keep
        if self._background is None:
            saved = save(self._folder, content, keep, trainer.ranks)
            self.saved_step = step
            self._warn(saved.notes)
            self._log.info(f"saved {folder_name(step)} in {time.perf_counter() - start:.1f} s")
            return
        self._background.start(self._folder, content, keep)
        seconds = time.perf_counter() - start
        self._log.info(
            f"copied {folder_name(step)} in {seconds:.1f} s; it is written in the background"
        )

    def finish(self, *, wait: bool) -> None:
        """Make a checkpoint of what was written beside training, if all of it is.

        Raises:
            CheckpointNotSaved: on every rank, when the file system refused a part of it.
        """
        if self._background is None or (step := self._background.step) is None:
            return
        self._trainer.progress.enter(self._trainer.state.step - 1, "save")
        if (saved := self._background.finish(wait=wait)) is not None:
            self.saved_step = step
            self._warn(saved.notes)
            self._log.info(f"saved {folder_name(step)}")

    def save_or_warn(self) -> None:
        """Save; if that fails, training continues without the checkpoint."""
        self._or_warn(self.save)

    def finish_or_warn(self, *, wait: bool) -> None:
        """Finish; if that fails, training continues without the checkpoint."""
        self._or_warn(lambda: self.finish(wait=wait))

    def roll_back(self, bad: Sequence[int]) -> None:
        """Return to a checkpoint from before the steps of these indices.

        Raises:
            Diverged: on every rank, when that does not help.
        """
        trainer, reached = self._trainer, self._trainer.state.step
        self.finish_or_warn(wait=True)
        trainer.progress.enter(reached - 1, "restore")
        info = roll_back(trainer, self._folder, bad)
        self._log.roll_back(info.step)
        self.saved_step = info.step
        self._log.info(
            f"step {reached}: {len(bad)} steps from {bad[0] + 1} to {bad[-1] + 1} were skipped; "
            f"rolled back to {folder_name(info.step)}; the data of those steps will be passed over"
        )

    def _warn(self, notes: Sequence[str]) -> None:
        """Log each note once: what cannot be removed is met again at every save."""
        for note in notes:
            if note not in self._warned:
                self._warned.add(note)
                self._log.info(f"warning: {note}")

    def _or_warn(self, act: Callable[[], None]) -> None:
        try:
            act()
        except CheckpointNotSaved as problem:
            self._log.info(f"warning: {problem}; training goes on")
