"""Rows of an environment that stand in a file of JSON lines."""

import random
from collections.abc import Iterator
from pathlib import Path

import xxhash

from nemotron.errors import UserError
from nemotron.files import parse_json, read_regular
from nemotron.posttrain.environments.base import BadRow, Row, belonging_to, messages_of

LARGEST_DATA = 1 << 30
"""Bytes of a file of rows, all of which are held in memory."""


class FileRows:
    """The rows of the file that an environment's option `data` names."""

    def __init__(self, name: str, data: str | None) -> None:
        """`name` is the environment's.

        Raises:
            UserError: when `data` is not the name of a file.
        """
        if data is not None and not isinstance(data, str):
            raise UserError(
                "must be the path of a file.", key="data", value=data, where=f"environments: {name}"
            )
        self._name, self._data = name, data

    def rows(self, count: int, seed: int) -> Iterator[Row]:
        """Yield rows in an order that depends on `seed`, again from the start if needed.

        Raises:
            UserError: when the file is absent, or a line of it is not a row.
        """
        found = self.load()
        for number in range(count):
            turn, place = divmod(number, len(found))
            if place == 0:
                order = list(range(len(found)))
                random.Random(f"{self._name} {seed} {turn}").shuffle(order)
            yield found[order[place]]

    def contents(self) -> dict[str, str]:
        """Return the hash of the file.

        Raises:
            UserError: when the file is absent.
        """
        self.load()
        assert self._data is not None
        digest = xxhash.xxh128(read_regular(Path(self._data), LARGEST_DATA)).hexdigest()
        return {f"rollout.environments.{self._name}.data = {self._data}": digest}

    def load(self) -> list[Row]:
        """Return all rows, each as one of this environment.

        Raises:
            UserError: when the file is absent, or a line of it is not a row.
        """
        where = f"environments: {self._name}"
        if self._data is None:
            rule = "is absent; give the path of a JSONL file of rows."
            raise UserError(rule, key="data", where=where)
        rows = []
        try:
            # not by splitlines, which also splits at letters that may stand in a text
            for line in read_regular(Path(self._data), LARGEST_DATA).split(b"\n"):
                if line.strip():
                    rows.append(_parse_row(line))
        except (OSError, ValueError) as error:
            rule = f"cannot be read: row {len(rows)}: {error}."
            raise UserError(rule, key="data", value=Path(self._data), where=where) from None
        if not rows:
            raise UserError("has no rows.", key="data", value=self._data, where=where)
        return [belonging_to(row, self._name) for row in rows]


class FromFile:
    """What environments have in common whose tasks stand in a file."""

    max_level = 0
    _rows: FileRows

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield rows in an order that depends on `seed`, again from the start if needed.

        Raises:
            UserError: when the file is absent, or a line of it is not a row.
        """
        yield from self._rows.rows(count, seed)

    def contents(self) -> dict[str, str]:
        """Return the hash of the file.

        Raises:
            UserError: when the file is absent.
        """
        return self._rows.contents()


def _parse_row(line: bytes) -> Row:
    """Return a row whose prompt and tools have their form.

    Raises:
        ValueError: when it is none.
    """
    row = parse_json(line)
    if not isinstance(row, dict):
        raise BadRow("it is not a JSON object")
    messages_of(row)
    return row
