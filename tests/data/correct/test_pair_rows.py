"""Pairs in shards: a document of 2K+1 sequences."""

from pathlib import Path

import numpy as np
import pytest

from nemotron.data.correct.pairs import PairRow, read_row, read_rows
from nemotron.data.indexed import Shard
from nemotron.data.prepare.writer import ShardWriter
from nemotron.errors import UserError

VOID = 19
ROWS = [
    PairRow(
        np.array([[40, 41, VOID, 43], [40, 44, 45, 43]]),
        np.array([40, 41, 42, 43, 43]),
        np.array([[1, 2, 0, 2], [1, 1, 1, 2]]),
    ),
    PairRow(np.array([[50], [51]]), np.array([51]), np.array([[1], [1]])),
    PairRow(np.array([[50], [51]]), np.array([], np.int64), np.array([[0], [0]])),
]


def write(prefix: Path, documents: list[list[list[int]]]) -> Shard:
    with ShardWriter(prefix, np.uint16) as writer:
        for document in documents:
            for sequence in document:
                writer.extend(sequence)
                writer.end_sequence()
            writer.end_document()
    return Shard(prefix)


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    shard = write(tmp_path / "a", [[s.tolist() for s in row.sequences()] for row in ROWS])
    shard.check()
    assert (shard.num_documents, shard.num_sequences) == (3, 15)
    for row, found in zip(ROWS, read_rows(shard), strict=True):
        for one, other in zip(row.sequences(), found.sequences(), strict=True):
            assert one.tolist() == other.tolist()


def test_a_token_is_kept_where_it_stands_for_itself_alone():
    assert ROWS[0].is_kept.tolist() == [[True, False, False, False], [True, False, False, False]]
    assert ROWS[1].is_kept.tolist() == [[False], [True]]
    assert ROWS[2].is_kept.tolist() == [[False], [False]]
    assert ROWS[0].target_of(0, 1).tolist() == [41, 42]
    assert ROWS[0].target_of(1, 3).tolist() == [43, 43]
    assert ROWS[0].target_of(0, 2).tolist() == []


@pytest.mark.parametrize("document", [[[5, 6, 2]], [[1, 2], [1]], [[1, 2], [1], [1]], [[1], [1]]])
def test_a_document_that_is_no_pair_is_refused_with_its_place(
    tmp_path: Path, document: list[list[int]]
):
    shard = write(tmp_path / "a", [document])
    with pytest.raises(UserError, match=r"a: document 0 has \d sequences of"):
        read_row(shard, 0)
