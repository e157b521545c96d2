"""The answers of an evaluation while they are given: a line each, and the settings beside them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nemotron.errors import UserError
from nemotron.files import (
    is_unfinished,
    naming,
    open_lines,
    parse_json,
    read_regular,
    sync,
    try_lock,
    write_json,
)
from nemotron.outputs import check_place
from nemotron.posttrain.suites.examine import Item
from nemotron.posttrain.suites.samples import Sample

SAMPLES = "samples.jsonl"


class SampleFile:
    """Answers in the folder of an evaluation; what a crash cut off is given again."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Open the file and read the answers that it has.

        `settings` are all that the answers depend on; they lie beside it.

        Raises:
            UserError: when its answers were given with other settings, or it is being written.
        """
        _keep_settings(path, settings)
        self.path = path
        self._file: BinaryIO = open_lines(self.path)
        try:
            if not try_lock(self._file.fileno(), self.path):
                rule = "is being written by another process; wait for its end."
                raise UserError(rule, where=str(self.path))
            self._stored = self._read()
        except BaseException:
            self._file.close()
            raise

    def take(self, items: Sequence[Item], budget: int | None, samples: int) -> list[Sample] | None:
        """Return the stored answers to the next rows; None if they are not all there.

        Raises:
            UserError: when other answers are stored in their place.
        """
        each = [1 if item.by_likelihood else samples for item in items]
        wanted = [
            (item.task, item.number, k, budget)
            for item, count in zip(items, each, strict=True)
            for k in range(count)
        ]
        found = [sample for sample, _ in self._stored[: len(wanted)]]
        given = [(s.task, s.number, s.sample, s.budget) for s in found]
        if given != wanted[: len(found)]:
            raise UserError(
                "holds other answers than these; name another folder.", where=str(self.path)
            )
        if len(found) < len(wanted):
            self._cut()
            return None
        self._stored = self._stored[len(wanted) :]
        return found

    def write(self, samples: Sequence[Sample]) -> None:
        """Add answers, which are on the disk afterwards."""
        with naming(self.path):
            self._file.write("".join(sample.as_line() for sample in samples).encode())
            sync(self._file)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self) -> list[tuple[Sample, int]]:
        """Return the answer of each whole line and its bytes, and cut what follows them."""
        self._file.seek(0)
        samples: list[tuple[Sample, int]] = []
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                samples.append((Sample.of_json(parse_json(line)), len(line)))
            except ValueError:
                raise UserError(
                    "is not an answer; name another folder.",
                    where=f"{self.path}, line {len(samples) + 1}",
                ) from None
            end += len(line)
        self._file.truncate(end)
        return samples

    def _cut(self) -> None:
        """Remove answers to a part of a group, whose others would be computed differently alone."""
        size = sum(length for _, length in self._stored)
        with naming(self.path):
            self._file.truncate(self._file.seek(0, 2) - size)
        self._stored = []


def check_folder(folder: Path, *, resume: bool) -> None:
    """Check that an evaluation may be written into a folder.

    Raises:
        UserError: when it is there already and may not be continued, or has no place.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file; name a new folder.", key="--out", value=folder)
    if not folder.exists() and not folder.parent.is_dir():
        rule = "is in a folder that does not exist; name one that does."
        raise UserError(rule, key="--out", value=folder)
    check_place(folder / SAMPLES, "--out")
    settings = _settings_of(folder / SAMPLES)
    if not folder.exists() or all(is_unfinished(path, settings.name) for path in folder.iterdir()):
        return
    if not resume:
        rule = "exists already; continue it with --resume, or name another folder."
        raise UserError(rule, key="--out", value=folder)
    if not settings.is_file():
        raise UserError("is not the folder of an evaluation.", key="--out", value=folder)


WEIGHTS = "weights"
"""The setting that is not an option: a hash of the model's weights."""


def _settings_of(path: Path) -> Path:
    return path.with_suffix(".settings.json")


def _keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings beside the answers, or see that they are those of before."""
    place = _settings_of(path)
    settings = json.loads(json.dumps(settings))
    if not place.exists():
        path.parent.mkdir(exist_ok=True)
        write_json(place, settings)
        return
    try:
        before = parse_json(read_regular(place))
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise UserError("is damaged; name another folder.", where=str(place))
    for key in sorted(settings.keys() | before.keys()):
        if settings.get(key) != before.get(key):
            rule = f"is not {before.get(key)!r:.80}, as in {path.parent}; name another folder."
            option = key if key == WEIGHTS else "--" + key.replace("_", "-")
            raise UserError(rule, key=option, value=str(settings.get(key))[:80])
