"""The records of one kind as columns of numbers."""

from array import array
from typing import Any, TypeGuard

import numpy as np

from nemotron.drawing.series import Series


class Table:
    """Columns by key; each has the rows of the records that have it."""

    def __init__(self) -> None:
        self._steps, self._tokens = array("d"), array("d")
        self._columns: dict[str, tuple[array[int], array[float]]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, record: dict[str, Any]) -> None:
        """Add a record; what is neither a number nor null is left out."""
        row = len(self._steps)
        self._steps.append(record["step"])
        tokens = record.get("data/tokens")
        self._tokens.append(tokens if is_number(tokens) else record["step"])
        columns = self._columns
        for key, value in record.items():
            if value is None:
                value = np.nan
            elif not is_number(value):
                continue
            if (column := columns.get(key)) is None:
                column = columns[key] = (array("q"), array("d"))
            column[0].append(row)
            column[1].append(value)

    @property
    def keys(self) -> list[str]:
        """Keys in the order in which they first came."""
        return [key for key in self._columns if key != "step"]

    def series(self, key: str, *, by_tokens: bool = False) -> Series:
        """Return the values of a key, none if no record has it."""
        rows, values = self._columns.get(key, (array("q"), array("d")))
        x = np.array(self._tokens if by_tokens else self._steps)
        return Series(x[np.array(rows, np.int64)], np.array(values))

    def last(self, key: str) -> float | None:
        """Return the newest finite value of a key."""
        values = self.series(key).finite.y
        return float(values[-1]) if len(values) else None


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value of a record is a number that a float holds."""
    if type(value) is float:
        return True
    return type(value) is int and abs(value) < 1 << 1000
