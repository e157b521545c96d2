"""Rows of an environment that stand in a file of JSON lines."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from nemotron.errors import UserError
from nemotron.files import parse_json, read_regular
from nemotron.posttrain.environments.base import (
    BadRow,
    Environment,
    Response,
    Row,
    Verdict,
    belonging_to,
    messages_of,
)

Check = Callable[[Row], None]
"""Raises `BadRow` for a row that an environment does not take."""

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
        self._found: list[Row] = []
        self._digest = ""

    def rows(self, count: int, seed: int, check: Check) -> Iterator[Row]:
        """Yield rows in an order that depends on `seed`, again from the start if needed.

        Raises:
            UserError: when the file is absent, or a line of it is not a row that `check` takes.
        """
        found = self.load(check)
        for number in range(count):
            turn, place = divmod(number, len(found))
            if place == 0:
                order = list(range(len(found)))
                random.Random(f"{self._name} {seed} {turn}").shuffle(order)
            yield found[order[place]]

    def contents(self, check: Check) -> dict[str, str]:
        """Return the hash of the file.

        Raises:
            UserError: when the file is absent, or a line of it is not a row that `check` takes.
        """
        self.load(check)
        return {f"rollout.environments.{self._name}.data = {self._data}": self._digest}

    def load(self, check: Check) -> list[Row]:
        """Return all rows, each as one of this environment; the file is read once.

        Raises:
            UserError: when the file is absent, or a line of it is not a row that `check` takes.
        """
        if self._found:
            return self._found
        if self._data is None:
            rule = "is absent; give the path of a JSONL file of rows."
            raise UserError(rule, key="data", where=f"environments: {self._name}")
        content = self._read(Path(self._data))
        found = []
        # not by splitlines, which also splits at letters that may stand in a text
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = belonging_to(_parse_row(line), self._name)
                check(row)
            except ValueError as error:
                raise self._wrong(f"cannot be read: line {number}: {error}.") from None
            found.append(row)
        if not found:
            raise self._wrong("has no rows; give at least one.")
        self._found, self._digest = found, xxhash.xxh128(content).hexdigest()
        return found

    def _read(self, path: Path) -> bytes:
        try:
            return read_regular(path, LARGEST_DATA)
        except OSError as error:
            problem = error.strerror or str(error)
        except ValueError as error:
            problem = str(error)
        raise self._wrong(f"cannot be read: {problem}; give a JSONL file of rows.")

    def _wrong(self, rule: str) -> UserError:
        assert self._data is not None
        where = f"environments: {self._name}"
        return UserError(rule, key="data", value=Path(self._data), where=where)


class FromFile:
    """What environments have in common whose tasks stand in a file."""

    max_level = 0
    _rows: FileRows

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield rows in an order that depends on `seed`, again from the start if needed.

        Raises:
            UserError: when the file is absent, or a line of it is not a row of this environment.
        """
        yield from self._rows.rows(count, seed, self.check)

    def contents(self) -> dict[str, str]:
        """Return the hash of the file.

        Raises:
            UserError: when the file is absent, or a line of it is not a row of this environment.
        """
        return self._rows.contents(self.check)

    def check(self, row: Row) -> None:
        """Take every row that has a prompt, which reading the file has checked."""


class OwnRows(FromFile):
    """Another environment, whose tasks stand in a file in place of those that it generates."""

    def __init__(self, environment: Environment, data: str) -> None:
        """`data` is a file of rows with the fields that the environment's verifier reads.

        Raises:
            UserError: when `data` is not the name of a file.
        """
        self.name = environment.name
        self._environment = environment
        self._rows = FileRows(self.name, data)

    def check(self, row: Row) -> None:
        """Check that a row has what the environment reads.

        Raises:
            BadRow: when it does not.
        """
        self._environment.check(row)

    def tools(self, row: Row) -> list[dict[str, Any]]:
        """Return the tools that the environment offers for a row."""
        return self._environment.tools(row)

    def seed(self, row: Row) -> Any:
        """Return the state in which the conversation about a row begins."""
        return self._environment.seed(row)

    def call(self, state: Any, name: str, arguments: dict[str, Any]) -> str:
        """Run a tool of the environment."""
        return self._environment.call(state, name, arguments)

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Return the environment's verdict."""
        return self._environment.verify(row, response, state)


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
