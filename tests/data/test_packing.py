"""Documents into rows: nothing lost in silence, nothing twice, and as full as the method allows."""

import itertools
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.config import DataConfig, PackingConfig, SourceConfig, leaves
from nemotron.data.indexed import Shard, Stream
from nemotron.data.loader import TrainingData
from nemotron.data.mixture import single_phase
from nemotron.data.packing import best_fit, first_fit, pack_stream, plan_rows
from nemotron.data.prepare.writer import ShardWriter
from tests.support.prepared import write_ids

CAPACITY = 9
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)


def make_stream(folder: Path, lengths: list[int]) -> Stream:
    """Two shards of documents whose tokens count on from one to the next."""
    half, first = len(lengths) // 2, 0
    shards = []
    for name, part in (("one", lengths[:half]), ("two", lengths[half:])):
        with ShardWriter(folder / name, np.int32) as writer:
            for length in part:
                writer.add(np.arange(first, first + length))
                first += length
        shards.append(Shard(folder / name))
    return Stream(shards)


@given(LENGTHS)
def test_both_methods_place_every_piece_once_and_overfill_no_row(lengths: list[int]):
    for method in (first_fit, best_fit):
        rows = method(lengths, CAPACITY)
        assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
        assert all(sum(lengths[number] for number in row) <= CAPACITY for row in rows)


@given(LENGTHS)
def test_sequential_rows_keep_the_order_and_close_only_when_full(lengths: list[int]):
    rows = first_fit(lengths, CAPACITY)
    assert [number for row in rows for number in row] == list(range(len(lengths)))
    for row, following in itertools.pairwise(rows):
        assert sum(lengths[i] for i in row) + lengths[following[0]] > CAPACITY


@given(LENGTHS)
def test_best_fit_puts_each_piece_where_it_leaves_the_least_room(lengths: list[int]):
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i in range(len(room)) if room[i] >= length]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= length
        else:
            room.append(CAPACITY - length)
    found = [CAPACITY - sum(lengths[i] for i in row) for row in best_fit(lengths, CAPACITY)]
    assert sorted(found) == sorted(room)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.sampled_from(["sequential", "best_fit"]),
)
def test_split_documents_lose_no_token_and_no_prediction(
    tmp_path_factory, lengths: list[int], kind: str
):
    stream = make_stream(tmp_path_factory.mktemp("stream"), lengths)
    plan = pack_stream(stream, CAPACITY, PackingConfig(kind=kind))
    assert plan.counts.lost_tokens == 0
    assert plan.counts.split_documents == sum(length > CAPACITY for length in lengths)
    pieces = [p for row in range(plan.counts.rows) for p in plan.pieces(row)]
    predicted = Counter(t for start, count in pieces for t in stream.read(start + 1, count - 1))
    starts = np.cumsum([0, *lengths])
    firsts = {int(start) for start, length in zip(starts, lengths, strict=False) if length}
    assert predicted == Counter(set(range(sum(lengths))) - firsts)


@pytest.mark.parametrize("kind", ["sequential", "best_fit"])
def test_dropped_and_truncated_documents_are_counted(tmp_path: Path, kind: str):
    stream = make_stream(tmp_path, [4, 12, 9, 20, 3])
    dropped = pack_stream(stream, CAPACITY, PackingConfig(kind=kind, long_documents="drop"))
    assert (dropped.counts.dropped_documents, dropped.counts.lost_tokens) == (2, 32)
    assert dropped.counts.tokens == 4 + 9 + 3
    cut = pack_stream(stream, CAPACITY, PackingConfig(kind=kind, long_documents="truncate"))
    assert (cut.counts.truncated_documents, cut.counts.lost_tokens) == (2, 3 + 11)
    assert cut.counts.tokens == 4 + 9 + 9 + 9 + 3
    assert "2 truncated (14 tokens lost)" in cut.counts.describe(CAPACITY)


def test_a_plan_is_made_once_and_found_again(tmp_path: Path):
    (tmp_path / "cache").mkdir()
    stream = make_stream(tmp_path, [4, 12, 9, 20, 3])
    config = PackingConfig(kind="best_fit")
    first = plan_rows(stream, "id", CAPACITY, config, tmp_path / "cache")
    [folder] = (tmp_path / "cache").glob("rows-*")
    before = folder.stat().st_mtime_ns
    again = plan_rows(stream, "id", CAPACITY, config, tmp_path / "cache")
    assert folder.stat().st_mtime_ns == before
    assert again.counts == first.counts
    assert [again.pieces(i) for i in range(again.counts.rows)] == [
        first.pieces(i) for i in range(first.counts.rows)
    ]


HEADER = np.lib.format.magic(1, 0) + b"\x76\x00" + b"{'descr': '<i8', (".ljust(118)
"""Of an array file, with a description that does not end."""


def planted(name: str, array: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / f"{name}.npy", array, allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "counts.json").write_text('{"rows": []}'),
        lambda folder: (folder / "counts.json").write_text("[" * 99_999),
        lambda folder: (folder / "counts.json").write_text('{"seats": 1}'),
        lambda folder: (folder / "counts.json").unlink(),
        lambda folder: os.truncate(folder / "starts.npy", 3),
        lambda folder: os.truncate(folder / "lengths.npy", 140),
        lambda folder: (folder / "starts.npy").write_bytes(HEADER),
        planted("row_ends", np.array([9])),
        planted("starts", np.array([0.5])),
        planted("starts", np.full(6, 1 << 60)),
        planted("lengths", np.full(6, -1)),
        planted("row_ends", np.array([len], dtype=object)),
        lambda folder: ((folder / "starts.npy").unlink(), os.mkfifo(folder / "starts.npy")),
    ],
)
@pytest.mark.timeout(60)  # a pipe that nobody writes is waited for without an end
def test_a_damaged_plan_is_made_again(damage: Callable, tmp_path: Path, caplog):
    (tmp_path / "cache").mkdir()
    stream = make_stream(tmp_path, [4, 12, 9, 20, 3])
    plan = partial(plan_rows, stream, "id", CAPACITY, PackingConfig(kind="best_fit"))
    first = plan(tmp_path / "cache")
    pieces = [first.pieces(row) for row in range(first.counts.rows)]
    [folder] = (tmp_path / "cache").glob("rows-*")
    damage(folder)
    again = plan(tmp_path / "cache")
    assert [again.pieces(row) for row in range(again.counts.rows)] == pieces
    assert "is damaged and is written again" in caplog.text


def test_a_plan_without_rows_is_stored_and_found(tmp_path: Path):
    (tmp_path / "cache").mkdir()
    stream = make_stream(tmp_path, [20])
    config = PackingConfig(kind="best_fit", long_documents="drop")
    for _ in range(2):
        plan = plan_rows(stream, "id", CAPACITY, config, tmp_path / "cache")
        assert (plan.counts.rows, len(plan.starts)) == (0, 0)


def test_packed_rows_of_a_run_hold_every_whole_document_once_a_pass(tmp_path: Path):
    documents = [[100 + i] * (1 + i % 6) for i in range(40)]
    write_ids(documents, tmp_path / "a", validation_fraction=0.0)
    config = DataConfig(
        sources=[SourceConfig(name="a", path=str(tmp_path / "a"))],
        cache=str(tmp_path / "cache"),
        seq_len=11,
        packing=PackingConfig(kind="best_fit"),
    )
    rows = TrainingData(config, single_phase(leaves(config.blend), 11, 11), seed=1, vocab_size=4096)
    [source] = rows.mixtures.sources.values()
    found: Counter[int] = Counter()
    for step in range(source.num_rows):
        batch = rows.batch(step)
        ids, documents_of = batch.input_ids[0], batch.seq_idx[0]
        for number in range(int(documents_of.max()) + 1):
            inside = ids[documents_of == number].tolist()
            inside = [token for token in inside if token != 2]
            assert len(set(inside)) <= 1
            found.update(inside)
    assert found == Counter(token for document in documents for token in document)
