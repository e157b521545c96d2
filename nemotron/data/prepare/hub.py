"""Data sets of the Hugging Face hub, or in its cache, or in a folder, read by `datasets`."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from nemotron.data.prepare.options import HubOptions
from nemotron.errors import UserError

HUB = "hf://"
"""What the name of a data set begins with."""
ROWS_PER_UNIT = 1 << 16


def describe_hub(source: str, options: HubOptions) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """Return what names a data set, and (start, stop, bytes) of its units.

    Downloaded, a unit is a range of rows; streamed, it is one file of the data set.

    Raises:
        UserError: when the data set cannot be loaded.
    """
    found = _load(source, options)
    facts = {"name": source, **options.model_dump()}
    if options.streaming:
        return facts, [(number, number + 1, 0) for number in range(found.num_shards)]
    rows = found.num_rows
    row_bytes = found.data.nbytes / max(1, rows)
    starts = range(0, rows, ROWS_PER_UNIT)
    ranges = [(start, min(start + ROWS_PER_UNIT, rows)) for start in starts]
    facts |= {"rows": rows, "fingerprint": found._fingerprint}
    return facts, [(*part, round((part[1] - part[0]) * row_bytes)) for part in ranges]


def read_hub(
    source: str, options: HubOptions, start: int, stop: int
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Yield number and content of each row of a unit, or why it cannot be read.

    Raises:
        UserError: when a streamed data set cannot be read on.
    """
    found = _load(source, options)
    if options.streaming:
        number = -1
        try:
            for number, row in enumerate(found.shard(num_shards=found.num_shards, index=start)):
                yield number, row
        except (ValueError, OverflowError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot be read after row {number} of part {start}: {reason}", where=source
            ) from None
        return
    for number in range(start, stop):
        try:
            yield number, found[number]
        except (ValueError, OverflowError) as error:
            yield number, bad_value("", error)


def bad_value(column: str, error: Exception) -> str:
    """Say which value of a row cannot be read, and why."""
    where = f"has a {column}" if column else "has a value"
    if isinstance(error, UnicodeError):
        return f"{where} that is not UTF-8 text"
    return f"{where} that cannot be read ({' '.join(str(error).split())[:200]})"


@cache
def _load(source: str, options: HubOptions) -> Any:  # Any: a Dataset or an IterableDataset
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            source.removeprefix(HUB),
            options.subset,
            split=options.split,
            revision=options.revision,
            streaming=options.streaming,
        )
    except Exception as error:  # the library and its readers raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot be loaded: {reason}", where=source) from None
