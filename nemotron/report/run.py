"""The records of a run, read from its folder, which may still be written to."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron.checkpoint.manifest import folder_name, read_manifest, steps
from nemotron.checkpoint.records import DamagedCheckpoint
from nemotron.errors import UserError
from nemotron.files import hash_file
from nemotron.recipe.flat import flat
from nemotron.recipe.read import read_yaml
from nemotron.report.samples import Sample, read_rollouts
from nemotron.report.table import Table, is_number
from nemotron.run.files import RunFiles
from nemotron.run.metrics import ABANDONED, MetricsReader, Record
from nemotron.run.provenance import Provenance, read_provenance
from nemotron.run.status import RunStatus, find_run, read_json, read_status

EVENTS_KEPT = 2000
LAST_BYTES = 1 << 18
"""Of the metrics, for the newest loss in a list."""


@dataclass(frozen=True)
class Event:
    """Something out of the ordinary."""

    step: int
    text: str
    kind: str
    """`skip`, `spike`, `roll-back`, `resume` or `other`."""


@dataclass(frozen=True)
class Hash:
    """A file and its xxh128."""

    name: str
    bytes: int
    xxh128: str


@dataclass
class Run:
    """One run, as far as its files can be read."""

    files: RunFiles
    label: str
    status: RunStatus
    recipe: dict[str, str] = field(default_factory=dict)
    """Every setting by its dotted key, as YAML."""
    provenance: Provenance | None = None
    train: Table = field(default_factory=Table)
    validation: Table = field(default_factory=Table)
    events: list[Event] = field(default_factory=list)
    abandoned: int = 0
    """Records of steps that a rollback undid."""
    experts: dict[str, Any] = field(default_factory=dict)
    formats: list[dict[str, str]] = field(default_factory=list)
    """The format of every linear layer, of a run that quantizes."""
    samples: list[Sample] = field(default_factory=list)
    hashes: list[Hash] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """A sentence for each file that is damaged, and about lines that were passed over."""

    @property
    def place(self) -> str:
        """The path of its folder, from the current one if it lies in there."""
        here = Path.cwd()
        path = self.files.path
        return str(path.relative_to(here) if path.is_relative_to(here) else path)

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run, if its recipe has them."""
        total = self.recipe.get("schedule.total_steps", "")
        if total.isdecimal():
            return int(total)
        tokens, batch = (
            self.recipe.get(key, "") for key in ("schedule.total_tokens", "batch.global_tokens")
        )
        known = tokens.isdecimal() and batch.isdecimal() and int(batch)
        return -(-int(tokens) // int(batch)) if known else None

    @property
    def step(self) -> int:
        """The newest step that a file knows of."""
        found = [table.series("data/tokens").x for table in (self.train, self.validation)]
        newest = max((int(x[-1]) for x in found if len(x)), default=0)
        return max(newest, self.status.step or 0)


def read_run(path: Path) -> Run:
    """Read a run; what is damaged is left out, with a sentence in `problems`.

    Raises:
        UserError: when the folder does not contain a run.
    """
    files = find_run(path)
    run = Run(files, files.path.name, RunStatus("new"))
    for read in (_read_status, _read_recipe, _read_provenance, _read_metrics, _read_tables):
        try:
            read(run)
        except UserError as error:
            run.problems.append(str(error))
        except OSError as error:
            run.problems.append(f"{error.filename} cannot be read: {error.strerror}.")
    run.samples += read_rollouts(files.rollouts, run.problems)
    _read_hashes(run)
    return run


def read_briefly(files: RunFiles) -> Run:
    """Read of a run what a list needs, whatever its length; damage is not looked for."""
    run = Run(files, files.path.name, RunStatus("damaged"))
    with contextlib.suppress(UserError):
        run.status = read_status(files)
    with contextlib.suppress(UserError):
        _read_recipe(run)
    with contextlib.suppress(OSError):
        for record in MetricsReader(files.metrics, ["validation"]):
            _add(run.validation, record)
        for record in MetricsReader(files.metrics, ["train"], LAST_BYTES):
            _add(run.train, record)
    return run


def _add(table: Table, record: Record) -> bool:
    """Add a record to a table if its step is a number that counts."""
    if not is_number(record["step"]):
        return False
    table.add(record)
    return True


def read_runs(paths: list[Path]) -> list[Run]:
    """Read several runs, with labels that differ.

    Raises:
        UserError: when one is not there, or is named twice.
    """
    runs = [read_run(path) for path in paths]
    folders = [run.files.path.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError("is named twice; give each run once.", where=str(folder))
    names = [run.label for run in runs]
    for run, path in zip(runs, paths, strict=True):
        if names.count(run.label) > 1:
            run.label = str(path)
    return runs


def _read_status(run: Run) -> None:
    run.status = read_status(run.files)


def _read_recipe(run: Run) -> None:
    if run.files.recipe.exists():
        run.recipe = flat(read_yaml(run.files.recipe).values)


def _read_provenance(run: Run) -> None:
    if not run.files.provenance.exists():
        return
    run.provenance = read_provenance(run.files.provenance)
    for start in run.provenance.starts:
        step, time = start.get("step"), start.get("time")
        if isinstance(step, int) and step > 0:
            run.events.append(Event(step, f"resumed at {time}", "resume"))


def _read_metrics(run: Run) -> None:
    if not run.files.metrics.exists():
        return
    reader = MetricsReader(run.files.metrics)
    tables = {"train": run.train, "validation": run.validation, "suites": run.validation}
    num_other = 0
    for record in reader:
        kind = record.get("kind")
        text = record.get("event")
        if kind == "event" and isinstance(text, str) and is_number(record["step"]):
            run.events.append(Event(int(record["step"] or 0), text, _kind(text)))
        elif kind not in tables or not _add(tables[str(kind)], record):
            num_other += 1
    if damaged := reader.num_damaged + num_other:
        run.problems.append(f"{damaged} damaged lines of {run.files.metrics} are left out.")
    if len(run.events) > EVENTS_KEPT:
        run.problems.append(f"only the last {EVENTS_KEPT} of {len(run.events)} events are here.")
    run.events = sorted(run.events, key=lambda event: event.step)[-EVENTS_KEPT:]
    abandoned = run.files.metrics.with_name(ABANDONED)
    if abandoned.exists():
        run.abandoned = sum(1 for _ in MetricsReader(abandoned, ["train"]))


def _kind(text: str) -> str:
    if text.startswith("skipped"):
        return "skip"
    if text.startswith("loss spike"):
        return "spike"
    return "roll-back" if text.startswith("passing over") else "other"


def _read_tables(run: Run) -> None:
    if run.files.experts.exists():
        run.experts = read_json(run.files.experts, dict)
    if run.files.precision.exists():
        table = read_json(run.files.precision, list)
        run.formats = [line for line in table if isinstance(line, dict)]


def _read_hashes(run: Run) -> None:
    files = run.files
    for path in (files.recipe, files.tokenizer):
        if path.is_file():
            run.hashes.append(Hash(path.name, path.stat().st_size, hash_file(path)))
    for step in sorted(steps(files.checkpoints)):
        folder = files.checkpoints / folder_name(step)
        try:
            known = read_manifest(folder).files
        except DamagedCheckpoint as damage:
            run.problems.append(f"{folder.name} {damage}.")
            continue
        except OSError as error:  # a run removes old checkpoints
            run.problems.append(f"{folder.name} cannot be read: {error.strerror}.")
            continue
        run.hashes += [
            Hash(f"{folder.name}/{name}", entry.bytes, entry.xxh128)
            for name, entry in known.items()
        ]
