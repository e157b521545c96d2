"""Where the records of a run go: metrics.jsonl, its mirrors, and the screen."""

from collections.abc import Mapping
from typing import Any

from nemotron.run.folder import RunFolder
from nemotron.run.metrics import MetricsFile, Record
from nemotron.run.screen import Screen
from nemotron.run.trackers import Mirrors


class RunLog:
    """Shows what happens; once opened, it writes records, too."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.validation: Record = {}
        """The newest record of that kind; empty before the first."""
        self._metrics: MetricsFile | None = None
        self._mirrors: Mirrors | None = None
        self._folder: RunFolder | None = None
        self._refused = False

    def open(self, metrics: MetricsFile, mirrors: Mirrors, folder: RunFolder) -> None:
        """From now on write records to these: of several ranks, the first one does."""
        self._metrics, self._mirrors, self._folder = metrics, mirrors, folder

    def record(self, record: Record) -> None:
        """Write a record and show it.

        Raises:
            RunFailed: when the folder of the run was removed or renamed.
        """
        if self._folder is not None:
            self._folder.check_held()
        if self._metrics is not None:
            self._metrics.write(record)
        if self._mirrors is not None:
            self._mirrors.log(record)
        self.screen.show(record)
        if record["kind"] == "validation":
            self.validation = record
        self.catch_up()

    def catch_up(self) -> None:
        """Write what the disk refused so far; say once that it does, and once that it is over."""
        files = [file for file in (self._metrics, self._folder, self.screen.log) if file]
        problems = {file.path: problem for file in files if (problem := file.catch_up())}
        for path, problem in list(problems.items())[:1]:
            if not self._refused:
                self.info(
                    f"warning: {problem.filename or path} cannot be written: {problem.strerror}; "
                    "training goes on, and what is missing is written when there is room"
                )
        if self._refused and not problems:
            self.info("what could not be written to the run's folder before is written now")
        self._refused = bool(problems)

    def record_experts(self, step: int, layers: Mapping[str, Any]) -> None:  # Any: nested JSON
        """Keep the newest load and bias of every expert, in a file of their own."""
        if self._folder is not None and layers:
            self._folder.write_experts(step, layers)

    def info(self, text: str) -> None:
        """Show a sentence that is not a record."""
        self.screen.info(text)

    def sync(self) -> None:
        """Force the records to the disk, before a checkpoint that builds on them."""
        if self._metrics is not None:
            self._metrics.sync()

    def roll_back(self, step: int) -> None:
        """Take the records after a step out of the metrics."""
        if self._metrics is not None:
            self._metrics.roll_back(step)
