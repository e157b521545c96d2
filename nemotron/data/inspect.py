"""Looking at data before a run: what a blend resolves to, documents, duplicates, rows as text."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemotron.data.batch import NO_LABEL
from nemotron.data.checksums import check_content, known_files
from nemotron.data.config import DataConfig, leaves
from nemotron.data.folder import read_manifest
from nemotron.data.indexed import Stream
from nemotron.data.loader import TrainingData
from nemotron.data.mixture import single_phase
from nemotron.data.plan import wide_console
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.terminal import printable

SOURCES_SHOWN = 50
SHOWN_CHARACTERS = 600
"""Of a row, from each end of it half."""
IDS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Statistics:
    """Lengths of documents in tokens, and how often documents repeat."""

    lengths: NDArray[np.int64]
    held_out: int
    repeated: int
    """Training documents that are also held out: here, in another source or in a validation set."""
    scanned: int
    held_out_in: Mapping[str, int] = field(default_factory=dict)
    """Those of `repeated` by the source or validation set that holds them out."""

    def percentiles(self) -> list[int]:
        """Return the 5th, 50th and 95th percentile and the longest."""
        if not len(self.lengths):
            return [0, 0, 0, 0]
        return [int(v) for v in np.percentile(self.lengths, [5, 50, 95, 100])]


def open_path(
    path: Path, *, tokenizer: str, eod_token: str | None, seq_len: int, cache: str
) -> TrainingData:
    """Open a prepared folder, a folder of shards or one shard as a run of one step would.

    Raises:
        UserError: when it is unfit.
    """
    manifest = read_manifest(path)
    end = eod_token or (manifest.eod_token if manifest else "</s>")
    packing = {"kind": "best_fit", "long_documents": "truncate"}
    chats = manifest is not None and manifest.form == "chats"
    values = {
        "sources": [{"name": path.absolute().name, "path": str(path)}],
        "tokenizer": tokenizer,
        "eod_token": end,
        "seq_len": seq_len,
        "cache": cache,
        **({"packing": packing} if chats else {}),
    }
    try:
        config = DataConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        rule = problem["msg"].replace("Input should", "must").removeprefix("Value error, ")
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{rule}.", key=key, where=str(path)) from None
    timeline = single_phase(leaves(config.blend), seq_len, seq_len)
    return TrainingData(config, timeline, seed=0, vocab_size=2**31 - 1)


def inspect(
    data: TrainingData,
    *,
    step: int,
    rows: int,
    documents: int,
    check: bool,
    plots: Path | None,
) -> int:
    """Print what the data is; `documents` are read of each source for lengths and duplicates.

    Raises:
        UserError: when `check` finds a damaged file or an id outside the vocabulary.
    """
    console = wide_console()
    for line in data.describe():
        console.print(line)
    found = gather_statistics(data, documents)
    _print_sources(console, data, found)
    for line in describe_leaks(found):
        console.print(line)
    if check:
        streams = [tokens.train for tokens in data.tokens.values()]
        check_all([*streams, *data.held_out.values()], data.tokenizer.vocab_size)
        console.print("all files and all ids are correct")
    for row in range(min(rows, data.num_rows(step))):
        console.print(show_row(data, step, row))
    if plots is not None:
        from nemotron.data.inspect_plots import draw

        lengths = {name: facts.lengths for name, facts in found.items()}
        for path in draw(data, lengths, plots):
            console.print(f"plot written: {path}")
    return DONE


def gather_statistics(data: TrainingData, documents: int) -> dict[str, Statistics]:
    """Return the statistics of each source from its first documents.

    Documents are the same when all their ids are. Held-out documents, those of `data.validation`
    among them, are compared with the training documents of every source.
    """
    held_out = {
        name: {_digest(tokens) for tokens in _documents(stream, documents)}
        for name, stream in data.held_out.items()
    }
    known = set().union(*held_out.values())
    found = {}
    for name, tokens in data.tokens.items():
        lengths, repeated, places = [], 0, Counter[str]()
        for document in _documents(tokens.train, documents):
            lengths.append(len(document))
            if known and (digest := _digest(document)) in known:
                repeated += 1
                places.update(place for place, kept in held_out.items() if digest in kept)
        found[name] = Statistics(
            np.asarray(lengths, np.int64), len(held_out[name]), repeated, len(lengths), places
        )
    return found


def describe_leaks(found: Mapping[str, Statistics]) -> Iterator[str]:
    """Yield a sentence for each source that trains on what a set holds out for validation."""
    for name, facts in found.items():
        for place, count in facts.held_out_in.items():
            yield (
                f"warning: {count:,} of the first {facts.scanned:,} training documents of {name} "
                f"are also held out in {place}, so the validation loss of {place} is too good"
            )


def check_all(streams: Sequence[Stream], vocab_size: int) -> None:
    """Read every byte of these shards, held-out ones included.

    Raises:
        UserError: for the first file whose checksum or index is wrong, or the first id too large.
    """
    for path, facts in known_files(streams).items():
        check_content(path, facts)
    for shard in (shard for stream in streams for shard in stream.shards):
        shard.check()
        for start in range(0, shard.num_tokens, IDS_AT_ONCE):
            part = shard.tokens[start : start + IDS_AT_ONCE]
            wrong = np.flatnonzero((part < 0) | (part >= vocab_size))
            if len(wrong):
                at = start + int(wrong[0])
                raise UserError(
                    f"token {at} is {int(shard.tokens[at])}, but the vocabulary ends "
                    f"at {vocab_size - 1}; use the tokenizer of this shard.",
                    where=str(shard.bin),
                )


def show_row(data: TrainingData, step: int, row: int) -> Text:
    """Return a row as text: a rule between documents, what is not learned in grey."""
    sample = data.sample_ids(step, slice(row, row + 1))[0]
    batch = data.batch(step, slice(row, row + 1))
    assert batch.seq_idx is not None
    ids, documents = batch.input_ids[0].tolist(), batch.seq_idx[0].tolist()
    learned = [True, *(batch.labels[0] != NO_LABEL).tolist()]
    text = Text(
        f"\nstep {step} row {row}: {printable(sample.source)}, "
        f"pass {sample.epoch}, sample {sample.sample}, "
        f"{documents[-1] + 1} documents, {sum(learned[1:])} of {len(ids)} tokens supervised\n",
        style="bold",
    )
    start = 0
    for at in range(1, len(ids) + 1):
        same = at < len(ids) and (documents[at], learned[at]) == (documents[start], learned[start])
        if same:
            continue
        part = printable(_shortened(data.tokenizer.decode(ids[start:at])))
        text.append(part, style="" if learned[start] else "bright_black")
        if at < len(ids) and documents[at] != documents[start]:
            text.append(f"\n──── document {documents[at]}\n", style="cyan")
        start = at
    return text


def _print_sources(console: Console, data: TrainingData, found: dict[str, Statistics]) -> None:
    for phase in data.timeline.phases:
        for length in phase.lengths:
            table = Table(
                title=f"phase {phase.name}, rows of {length.seq_len:,}",
                title_justify="left",
                box=None,
                pad_edge=False,
            )
            for heading in ("source", "group", "tier"):
                table.add_column(heading)
            for heading in (
                *("share", "tokens", "documents", "held out"),
                *("p5", "p50", "p95", "longest", "repeated"),
            ):
                table.add_column(heading, justify="right")
            whole = sum(leaf.weight for leaf in length.leaves)
            for leaf in length.leaves[:SOURCES_SHOWN]:
                name = leaf.source.name
                train, facts = data.tokens[name].train, found[name]
                table.add_row(
                    *(name, leaf.group or "", leaf.source.tier or ""),
                    f"{leaf.weight / whole:.3%}",
                    f"{train.num_tokens:,}",
                    f"{train.num_documents:,}",
                    f"{data.tokens[name].validation.num_documents:,}",
                    *(f"{value:,}" for value in facts.percentiles()),
                    f"{facts.repeated:,} of {facts.scanned:,}",
                )
            console.print(table)
            if (more := len(length.leaves) - SOURCES_SHOWN) > 0:
                console.print(f"and {more:,} more sources")


def _documents(stream: Stream, most: int) -> Iterator[NDArray[np.integer]]:
    left = most
    for shard in stream.shards:
        for number in range(min(left, shard.num_documents)):
            yield shard.document(number)
        left -= min(left, shard.num_documents)
        if not left:
            return


def _digest(tokens: NDArray[np.integer]) -> int:
    return xxhash.xxh64_intdigest(tokens.astype("<i4").tobytes())


def _shortened(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:half]} […{len(text) - SHOWN_CHARACTERS:,} characters…] {text[-half:]}"
