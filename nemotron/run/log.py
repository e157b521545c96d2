"""Where the records of a run go: metrics.jsonl, its mirrors, and the screen."""

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

    def open(self, metrics: MetricsFile, mirrors: Mirrors) -> None:
        """From now on write records to these: of several ranks, the first one does."""
        self._metrics, self._mirrors = metrics, mirrors

    def record(self, record: Record) -> None:
        """Write a record and show it."""
        if self._metrics is not None:
            self._metrics.write(record)
        if self._mirrors is not None:
            self._mirrors.log(record)
        self.screen.show(record)
        if record["kind"] == "validation":
            self.validation = record

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
