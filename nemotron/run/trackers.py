"""Mirrors of metrics.jsonl: Weights & Biases, TensorBoard, trackio. None of them can stop a run."""

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from nemotron.errors import UserError
from nemotron.run.metrics import Record

INSTALL = {
    "wandb": ("wandb", "pip install wandb"),
    "tensorboard": ("tensorboard", "pip install 'nemotron-train[track]'"),
    "trackio": ("trackio", "pip install 'nemotron-train[track]'"),
}
"""The package that each tracker needs, and the line that installs it."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker receives about a run; `id` stays the same when the run is resumed."""

    project: str
    name: str
    id: str
    folder: Path
    step: int
    config: dict[str, Any]  # Any: the resolved recipe


class Tracker(Protocol):
    """What every mirror offers."""

    def start(self, run: TrackedRun) -> str:
        """Start or resume the run; returns where it can be viewed."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the numbers of one step."""
        ...

    def finish(self) -> None:
        """Send the remaining data."""
        ...


class Wandb:
    """Weights & Biases; without a key in the environment it writes into the run's folder only."""

    def start(self, run: TrackedRun) -> str:
        import wandb

        offline = not os.environ.get("WANDB_API_KEY") and "WANDB_MODE" not in os.environ
        # the resolved recipe is all that is sent: no host, no code, no command line
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
        )
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=run.config,
            mode="offline" if offline else None,  # None: what WANDB_MODE says
            settings=settings,
        )
        if self._run.url is not None:
            return str(self._run.url)
        return f"offline in {run.folder / 'wandb'} (set WANDB_API_KEY, or `wandb sync` it later)"

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in the run's folder."""

    _newest: int

    def start(self, run: TrackedRun) -> str:
        self._folder, self._newest = run.folder / "tensorboard", run.step
        self._open(run.step + 1)
        return f"tensorboard --logdir {self._folder}"

    def log(self, step: int, values: dict[str, float]) -> None:
        if step < self._newest:  # the run was rolled back
            self._writer.close()
            self._open(step)
        self._newest = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()

    def _open(self, step: int) -> None:
        """Begin a file; what older ones have from this step on is void, as in metrics.jsonl."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step)


class Trackio:
    """A local database under the user's cache folder."""

    def start(self, run: TrackedRun) -> str:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                run.project,
                name=f"{run.name}-{run.id}",
                config=run.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return f"trackio show --project {run.project}"

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Check that each tracker's package is installed.

    Raises:
        UserError: with the line that installs it.
    """
    for name in names:
        package, line = INSTALL[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"needs a package that is not installed: {line}; or remove it from the list.",
                key="logging.trackers",
                value=name,
            )


class Mirrors:
    """Several trackers; one that fails is named and dropped, and the run continues."""

    def __init__(self, trackers: dict[str, Tracker], info: Callable[[str], None]) -> None:
        self._trackers = dict(trackers)
        self._info = info

    def start(self, run: TrackedRun) -> None:
        """Start all trackers and log where each can be viewed."""
        for name, tracker in list(self._trackers.items()):
            where = self._guard(name, partial(tracker.start, run))
            if where is not None:
                self._info(f"{name}: {where}")

    def log(self, record: Record) -> None:
        """Send the numbers of a record."""
        values = {k: float(v) for k, v in record.items() if isinstance(v, int | float)}
        step = int(values.pop("step"))
        for name, tracker in list(self._trackers.items()):
            self._guard(name, partial(tracker.log, step, values))

    def finish(self) -> None:
        """Let all trackers send the remaining data."""
        for name, tracker in list(self._trackers.items()):
            self._guard(name, tracker.finish)

    def _guard(self, name: str, call: Callable[[], Any]) -> Any:  # Any: whatever the call returns
        try:
            return call()
        except Exception as error:  # whatever a mirror's library raises must not stop a run
            del self._trackers[name]
            self._info(
                f"{name} failed and is not used from now on "
                f"({type(error).__name__}: {error}); metrics.jsonl is complete"
            )
            return None
