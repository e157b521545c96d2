"""Prepares a data set with many processes; after a kill, the same command continues it."""

import json
import logging
import multiprocessing
import os
import re
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from nemotron.data.folder import FORMAT, MANIFEST, Manifest, read_manifest
from nemotron.data.prepare import interrupts
from nemotron.data.prepare.assemble import assemble
from nemotron.data.prepare.inputs import Plan, Unit, plan
from nemotron.data.prepare.options import PrepareOptions, parse_filter
from nemotron.data.prepare.progress import PrepareProgress
from nemotron.data.prepare.read import Bad, read_rows
from nemotron.data.prepare.unit import Receipt, write_unit
from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import UserError
from nemotron.files import hash_file, open_regular, read_regular, try_lock, write_json
from nemotron.outputs import (
    MARK,
    begin,
    check_output,
    output_folder,
    publish,
    refuse_inputs_inside,
    remove_folder,
    unwritable,
)

log = logging.getLogger(__name__)

COMMAND, PAIRS_COMMAND = "data prepare", "data pairs"
SHARD_FILE = re.compile(r"(train|validation)-\d{5}\.(bin|idx|loss)(\.\d+\.tmp)?")
WORK_FILE = re.compile(r"lock|plan\.json|unit-\d{5}\.json|\.(plan|unit-\d{5})\.json\..+\.tmp")
POLLED_S = 0.5
"""Seconds between two looks at the progress."""


@dataclass(frozen=True)
class PrepareJob:
    """What a worker receives once, at its start."""

    folder: Path
    work: Path
    tokenizer: str
    options: PrepareOptions
    max_bad_rows: int
    limit: str
    """What sets `max_bad_rows`, for messages."""

    @property
    def command(self) -> str:
        """The command whose mark the folders bear."""
        return PAIRS_COMMAND if self.options.pairs else COMMAND


class TooManyBadRows(UserError):
    """More rows cannot be read than the user allows."""


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str = "embedded",
    options: PrepareOptions,
    workers: int,
    max_bad_rows: int,
    limit: str = "--max-bad-rows",
    overwrite: bool = False,
) -> Manifest:
    """Write `out` with shards and manifest; the same input gives the same bytes.

    Finished shards lie in `OUT.partial` until all are there; given again, a command that was
    stopped goes on with the others.

    Raises:
        UserError: when the input, an option or the disk is not fit; what was finished stays.
    """
    encoder = load_tokenizer(tokenizer, "--tokenizer")
    encoder.id(options.eod_token)
    for text in options.filters:
        parse_filter(text)
    out = output_folder(out)
    folder, work = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.work")
    made = plan(sources, options, (out, folder, work))
    read = [*made.files, Path(tokenizer)]
    for written in (out, folder, work):
        refuse_inputs_inside(written, read)
    job = PrepareJob(folder, work, tokenizer, options, max_bad_rows, limit)
    if out.exists() and not overwrite:
        return _finished(out, work, made, identity_of(made, encoder, options), job.command)
    check_output(out, job.command, read, overwrite=overwrite)
    for sentence in made.passed_over:
        log.warning("%s", sentence)
    try:
        with _workplace(job, made, encoder):
            receipts = _write_units(made, job, workers)
            if not any(receipt.train for receipt in receipts):
                raise UserError(
                    f"there is no document to train on ({_why_empty(receipts, made, options)}); "
                    "nothing was written.",
                    where=", ".join(sources),
                )
            hashed = _hashed_inputs(made)
            _remove_unfinished(folder)  # what an orphan of a killed command began while it died
            manifest = assemble(receipts, folder, encoder, options, hashed)
            publish(folder, out, job.command)
            _remove_work(work)
    except OSError as error:
        raise unwritable(error, out, "finished shards are kept") from None
    return manifest


def identity_of(made: Plan, tokenizer: Tokenizer, options: PrepareOptions) -> dict[str, Any]:
    """Return everything that the output depends on, as the manifest has it."""
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.hash,
        "options": options.described(),
        "inputs": list(made.inputs),
    }


def _hashed_inputs(made: Plan) -> list[dict[str, Any]]:  # Any: strings and numbers
    """Return the inputs with the hash of each file.

    Raises:
        UserError: when a file was changed since the plan was made.
    """
    found = []
    for facts, stamp in zip(made.inputs, made.stamps, strict=True):
        path = facts["name"]
        if "bytes" not in facts:  # a data set of the hub has a fingerprint or a revision
            found.append(facts)
            continue
        found.append(facts | {"xxh128": hash_file(Path(path))})
        status = os.stat(path)
        if (status.st_size, status.st_mtime_ns) != (facts["bytes"], stamp):
            raise UserError(
                "was changed while it was read; run the command again.", where=str(path)
            )
    return found


def _finished(
    out: Path, work: Path, made: Plan, identity: dict[str, Any], command: str
) -> Manifest:
    """Return the manifest of an existing output if the same inputs and options made it."""
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None:
        raise UserError("exists and is not prepared data; choose another --out.", where=str(out))
    known = manifest.model_dump(mode="json")
    hashes = [facts.pop("xxh128", None) for facts in known["inputs"]]
    if any(known[key] != value for key, value in identity.items()):
        raise UserError(
            "was prepared from other input or with other options; choose another --out, "
            "or replace it with --overwrite.",
            where=str(out),
        )
    for facts, before in zip(_hashed_inputs(made), hashes, strict=True):
        if facts.get("xxh128") != before:
            raise UserError(
                f"was changed since {out} was prepared from it; choose another --out, or replace "
                "it with --overwrite.",
                where=facts["name"],
            )
    if work.is_dir():  # a command that was killed at its very end left it
        _adopt(work, WORK_FILE, command)
        _remove_work(work)
    return manifest


@contextmanager
def _workplace(job: PrepareJob, made: Plan, tokenizer: Tokenizer) -> Iterator[None]:
    """Hold the folders of an unfinished preparation, new or begun by the same command."""
    plan_file = job.work / "plan.json"
    identity = identity_of(made, tokenizer, job.options) | {"stamps": list(made.stamps)}
    _adopt(job.work, WORK_FILE, job.command)
    path = job.work / "lock"
    with open(open_regular(path, os.O_WRONLY | os.O_CREAT), "a") as lock:
        if not try_lock(lock.fileno(), path):
            raise UserError(
                "is in use by another preparation; wait for it to end.", where=str(job.work)
            )
        if plan_file.exists() and not _holds(plan_file, identity):
            raise UserError(
                f"was started with other input or options; run the command that "
                "started "
                f"it, or remove {job.folder} and {job.work}.",
                where=str(job.folder),
            )
        _adopt(job.folder, SHARD_FILE, job.command)
        _remove_unfinished(job.folder)
        if not plan_file.exists():
            write_json(plan_file, identity)
        try:
            yield
        except BaseException:
            _remove_unfinished(job.folder)
            if {path.name for path in job.folder.iterdir()} <= {MARK}:
                remove_folder(job.folder, {MARK})
                _remove_work(job.work)
            raise


def _adopt(folder: Path, pattern: re.Pattern[str], command: str) -> None:
    """Make a folder, or take the one that a stopped preparation left; it holds nothing else.

    Raises:
        UserError: when it holds anything else.
    """
    begin(folder, command)
    for path in folder.iterdir():
        known = path.name == MARK or path.name == MANIFEST or pattern.fullmatch(path.name)
        if not known or path.is_symlink() or not path.is_file():
            raise UserError(
                f"is not a file of nemotron {command}; move it elsewhere, or choose another --out.",
                where=str(path),
            )


def _holds(plan_file: Path, identity: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(read_regular(plan_file)) == identity)
    except (ValueError, RecursionError):
        return False


def _remove_work(work: Path) -> None:
    remove_folder(work, {MARK, *(p.name for p in work.iterdir() if WORK_FILE.fullmatch(p.name))})


def _remove_unfinished(folder: Path) -> None:
    for leftover in folder.glob("*.tmp"):
        if SHARD_FILE.fullmatch(leftover.name):
            leftover.unlink()


def _write_units(made: Plan, job: PrepareJob, workers: int) -> list[Receipt]:
    """Return the receipts of all units in order, writing those that are not there."""
    receipts = {unit.number: found for unit in made.units if (found := _receipt(job, unit))}
    _check_bad_rows(receipts, job)
    todo = [unit for unit in made.units if unit.number not in receipts]
    done = sum(unit.size for unit in made.units if unit.number in receipts)
    total = sum(unit.size for unit in made.units)
    with PrepareProgress(total, done) as progress:
        results = (
            _in_this_process(todo, job, progress)
            if min(workers, len(todo)) <= 1
            else _in_processes(todo, job, min(workers, len(todo)), progress)
        )
        with closing(results):
            for number, receipt in results:
                receipts[number] = receipt
                _check_bad_rows(receipts, job)
    return [receipts[unit.number] for unit in made.units]


def _in_this_process(
    todo: Sequence[Unit], job: PrepareJob, progress: PrepareProgress
) -> Generator[tuple[int, Receipt], None, None]:
    tokenizer = load_tokenizer(job.tokenizer)
    for unit in todo:
        yield unit.number, _work(unit, job, tokenizer, progress.advance)


def _in_processes(
    todo: Sequence[Unit], job: PrepareJob, workers: int, progress: PrepareProgress
) -> Generator[tuple[int, Receipt], None, None]:
    context = multiprocessing.get_context("spawn")
    try:
        counter = context.Value("q", 0)
        pool = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(job, counter)
        )
    except OSError as error:
        raise UserError(
            f"worker processes cannot share memory: {error.strerror or error} in /dev/shm; use "
            "--workers 1, or give this machine or container a /dev/shm that can be written.",
            because=error,
        ) from None
    with interrupts.noted() as noted, pool:
        with interrupts.blocked():  # the pool starts its workers here
            running = {pool.submit(_work_here, unit): unit.number for unit in todo}
        try:
            while running and not noted:
                done, _ = wait(running, POLLED_S, FIRST_COMPLETED)
                progress.reach(counter.value)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); use fewer --workers "
                "and run the same command again: finished shards are kept."
            ) from None
        finally:
            if running:
                for process in multiprocessing.active_children():
                    process.terminate()


_worker: tuple[PrepareJob, "Synchronized[int]", Tokenizer] | None = None
"""What this process works with, if it is a worker."""


def _start_worker(job: PrepareJob, counter: "Synchronized[int]") -> None:
    global _worker
    if connection.wait([_parent_sentinel()], timeout=0):
        os._exit(1)  # the parent died while this process was starting
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    _worker = job, counter, load_tokenizer(job.tokenizer)


def _end_with_parent() -> None:
    """Die when the parent does: nothing cleans up after an orphan that still writes."""
    connection.wait([_parent_sentinel()])
    os._exit(1)


def _parent_sentinel() -> int:
    parent = multiprocessing.parent_process()
    assert parent is not None
    return parent.sentinel


def _work_here(unit: Unit) -> Receipt:
    assert _worker is not None
    job, counter, tokenizer = _worker

    def tick(size: int) -> None:
        with counter.get_lock():
            counter.value += size

    return _work(unit, job, tokenizer, tick)


def _work(unit: Unit, job: PrepareJob, tokenizer: Tokenizer, tick: Any) -> Receipt:
    found: list[str] = []

    def on_bad(text: str) -> None:
        found.append(text)
        if len(found) > job.max_bad_rows:
            raise _too_many(found[0], len(found), job)

    receipt = write_unit(unit, job.folder, tokenizer, job.options, tick, on_bad)
    write_json(_receipt_path(job, unit), receipt.model_dump(mode="json"))
    return receipt


def _receipt_path(job: PrepareJob, unit: Unit) -> Path:
    return job.work / f"unit-{unit.number:05d}.json"


def _receipt(job: PrepareJob, unit: Unit) -> Receipt | None:
    """Return the receipt of a finished unit whose files exist in full size."""
    path = _receipt_path(job, unit)
    if not path.exists():
        return None
    try:
        receipt = Receipt.model_validate_json(read_regular(path))
    except ValueError:
        return None
    files = {
        job.folder / name: facts.bytes
        for shard in (receipt.train, receipt.validation)
        if shard
        for name, facts in shard.files.items()
    }
    whole = all(path.exists() and path.stat().st_size == size for path, size in files.items())
    return receipt if whole else None


def _check_bad_rows(receipts: dict[int, Receipt], job: PrepareJob) -> None:
    count = sum(receipt.counts.bad for receipt in receipts.values())
    if count > job.max_bad_rows:
        first = next(receipts[n].bad_rows[0] for n in sorted(receipts) if receipts[n].bad_rows)
        raise _too_many(first, count, job)


def _too_many(first: str, count: int, job: PrepareJob) -> TooManyBadRows:
    return TooManyBadRows(
        f"{first} ({count} bad rows so far, {job.limit} {job.max_bad_rows}); correct the input, "
        "or allow more and run the command again: finished shards are kept."
    )


def _why_empty(receipts: Sequence[Receipt], made: Plan, options: PrepareOptions) -> str:
    counts = {
        key: sum(getattr(receipt.counts, key) for receipt in receipts)
        for key in ("rows", "empty", "filtered", "bad", "held_out_documents", "unsupervised")
    }
    text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in counts.items() if value)
    if counts["filtered"] and (unknown := _unknown_column(made, options)):
        return f"{text}; of a --filter, {unknown}"
    first = next((receipt.bad_rows[0] for receipt in receipts if receipt.bad_rows), None)
    return (text or "no rows") if first is None else f"{text}; the first bad one: {first}"


def _unknown_column(made: Plan, options: PrepareOptions) -> str | None:
    """Say which column of a filter the first readable row does not have."""
    pieces = (piece for unit in made.units for piece in unit.pieces)
    rows = (row for piece in pieces for row in read_rows(piece, options, lambda size: None))
    first = next((row for row in rows if not isinstance(row, Bad)), None)
    if first is None:
        return None
    place, row = first
    columns = [parse_filter(text).column for text in options.filters]
    return next((f"{place()} has no column {name}" for name in columns if name not in row), None)
